// Starts every section of the page.
import { begin } from "./api.js";
import { startCosts } from "./costs.js";
import { startLosses } from "./losses.js";
import { startMaps } from "./maps.js";
import { startModels } from "./models.js";
import { startPositions } from "./positions.js";
import { startSharing } from "./sharing.js";
import { state } from "./state.js";
import { startSteps } from "./steps.js";
import { startWithout } from "./without.js";

const section = (name) => document.getElementById(name);
const beginning = await begin();
const { models, chosen, text, settings } = beginning;
Object.assign(state, { models, chosen, text, settings });
startModels(section("begin"), beginning);
startLosses(section("losses"));
startMaps(section("maps"));
startSharing(section("sharing"));
startPositions(section("positions"));
startSteps(section("steps"));
startWithout(section("without"));
startCosts(section("costs"));
document.documentElement.dataset.ready = "true";

// Questions to the server, or, in a page that was exported, to what was baked into it.

const bakedIn = document.getElementById("baked");
export const exported = bakedIn !== null;
const KEPT = 256; // answers, the last that were used: all maps of a few models among them
const answers = new Map();

async function unpackBaked() {
  const bytes = Uint8Array.from(atob(bakedIn.textContent.trim()), (character) => character.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const content = new Uint8Array(await new Response(stream).arrayBuffer());
  const split = new DataView(content.buffer).getUint32(0);
  const index = JSON.parse(new TextDecoder().decode(content.subarray(4, 4 + split)));
  return { index, tensors: content.subarray(4 + split) };
}
const baked = exported ? unpackBaked() : null;

/** The same question has the same name, whatever the order of its parts. */
function nameOf(question, body) {
  return `${question} ${JSON.stringify(Object.fromEntries(Object.entries(body).sort(([a], [b]) => (a < b ? -1 : 1))))}`;
}

async function fromBaked(name) {
  const { index, tensors } = await baked;
  if (!(name in index)) throw new Error("This page was exported without the answer to this; gptlab explore has it.");
  const answer = index[name];
  if (answer.error) throw new Error(sentence(answer.error));
  if (!answer.shape) return answer;
  const size = answer.shape.reduce((a, b) => a * b, 1);
  return { shape: answer.shape, data: tensors.subarray(answer.at, answer.at + size) };
}

async function fromServer(question, body, signal) {
  const headers = { "Content-Type": "application/json" };
  let response;
  try {
    response = await fetch(`api/${question}`, { method: "POST", headers, body: JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Error("The program does not answer any more; start gptlab explore again and reload this page.");
  }
  if (!response.ok) {
    const { error } = await response.json();
    throw new Error(sentence(error.message));
  }
  if (!response.headers.has("X-Shape")) return response.json();
  const shape = response.headers.get("X-Shape").split(",").map(Number);
  return { shape, data: new Uint8Array(await response.arrayBuffer()) };
}

const sentence = (text) => `${text[0].toUpperCase()}${text.slice(1)}${/[.?!]$/.test(text) ? "" : "."}`;

/**
 * Ask a question of gptlab/exploring/questions.py; answers are kept.
 * Returns an object, or `{shape, data}` with a Uint8Array. Throws an Error whose message can be shown.
 */
export async function ask(question, body, signal) {
  const name = nameOf(question, body);
  if (answers.has(name)) {
    const kept = answers.get(name);
    answers.delete(name);
    answers.set(name, kept);
    return kept;
  }
  const answer = exported ? await fromBaked(name) : await fromServer(question, body, signal);
  answers.set(name, answer);
  if (answers.size > KEPT) answers.delete(answers.keys().next().value);
  return answer;
}

/** What the page begins with. */
export async function begin() {
  return exported ? (await baked).index.begin : (await fetch("api/begin")).json();
}

// The calculator: one model without and with the changes. It shows itself only after it has found what Python found.
"use strict";

function agrees(data, check) {
  const m = { ...data.models[check.model] };
  for (const name of ["n_kv_head", "window"]) if (name in check) m[name] = check[name];
  const found = { parameters: parameters(m).total, ...step(m, check.context, check.batch, data.size, data.bandwidth, data.peak) };
  return ["parameters", "weightBytes", "cacheBytes", "seconds", "limit"].every((name) => found[name] === check[name]);
}

function startCalculator(root, data) {
  const at = (name) => root.querySelector(`[name="${name}"]`);
  const whole = (n) => Math.round(n).toLocaleString("en-US");
  const digits = (n) => n >= 1000 ? whole(n) : String(Number(n.toPrecision(3)));
  const bytes = (n) => {
    for (const [unit, size] of [["GiB", 2 ** 30], ["MiB", 2 ** 20], ["KiB", 2 ** 10]]) if (n >= size) return `${digits(n / size)} ${unit}`;
    return `${n} B`;
  };
  const millions = (n) => n >= 1e9 ? `${digits(n / 1e9)}B` : `${digits(n / 1e6)}M`;
  const waits = { weights: "weights", cache: "the cache", arithmetic: "arithmetic" };
  const option = (value, text) => new Option(text, value);

  at("model").replaceChildren(...Object.keys(data.models).map((name) => option(name, name)));
  at("bandwidth").value = digits(data.bandwidth / 1e9).replace(",", "");
  at("peak").value = digits(data.peak / 1e9).replace(",", "");
  const limits = { bandwidth: [at("bandwidth").value, data.bandwidth], peak: [at("peak").value, data.peak] };
  // As long as nobody has typed another figure, the measured one counts with all its digits.
  const limit = (name) => at(name).value === limits[name][0] ? limits[name][1] : 1e9 * Number(at(name).value);

  function heads() {
    const m = data.models[at("model").value], before = Number(at("n_kv_head").value);
    at("n_kv_head").replaceChildren(...m.kv.map((n) => option(n, n === m.n_head ? `${n} (all)` : n)));
    at("n_kv_head").value = m.kv.includes(before) ? before : m.kv.reduce((a, b) => (Math.abs(b - m.n_head / 3) < Math.abs(a - m.n_head / 3) ? b : a));
  }

  function show() {
    const plain = data.models[at("model").value];
    const changed = { ...plain, n_kv_head: Number(at("n_kv_head").value), window: Number(at("window").value) || null };
    const context = 2 ** Number(at("context").value), batch = 2 ** Number(at("batch").value);
    const bandwidth = limit("bandwidth"), peak = limit("peak");
    root.querySelector("[data-for=context]").value = whole(context);
    root.querySelector("[data-for=batch]").value = whole(batch);
    const valid = bandwidth > 0 && peak > 0;
    const steps = [plain, changed].map((m) => valid ? step(m, context, batch, data.size, bandwidth, peak) : null);
    const longest = valid ? Math.max(...steps.map((s) => s.seconds)) : 1;
    steps.forEach((s, i) => {
      const m = [plain, changed][i];
      const cells = {
        parameters: millions(parameters(m).total),
        weights: s && bytes(s.weightBytes), cache: s && bytes(s.cacheBytes),
        time: s && `${digits(1000 * s.seconds)} ms`, speed: s && digits(s.tokensPerSecond), limit: s && waits[s.limit],
      };
      for (const [name, text] of Object.entries(cells)) root.querySelector(`[data-cell="${name}-${i}"]`).textContent = text || "-";
      root.querySelector(`[data-bar="weights-${i}"]`).style.width = `${s ? 100 * s.weightSeconds / longest : 0}%`;
      root.querySelector(`[data-bar="cache-${i}"]`).style.width = `${s ? 100 * s.cacheSeconds / longest : 0}%`;
    });
    const gain = valid ? steps[0].seconds / steps[1].seconds : 0;
    root.querySelector("[data-cell=gain]").textContent = valid
      ? `${gain < 10 ? gain.toFixed(2) : whole(gain)}× the tokens per second, 1/${digits(steps[0].cacheBytes / steps[1].cacheBytes)} of the cache reads.`
      : "Bandwidth and peak must be numbers above 0.";
    const beyond = plain.position === "learned" && context > plain.context_length;
    root.querySelector("[data-cell=remark]").textContent = beyond
      ? `Learned positions end at ${whole(plain.context_length)}; a context this long needs rotary positions.` : "";
  }

  if (!data.checks.every((check) => agrees(data, check))) {
    root.dataset.agrees = "false";
    return;
  }
  heads();
  root.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  root.addEventListener("input", (event) => { if (event.target.name === "model") heads(); show(); });
  show();
  root.dataset.agrees = "true";
  root.querySelector("form").hidden = false;
  root.querySelector("[data-cell=failed]").hidden = true;
}

for (const root of document.querySelectorAll(".calculator")) startCalculator(root, JSON.parse(root.querySelector("script").textContent));

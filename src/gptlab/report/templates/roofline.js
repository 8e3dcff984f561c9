// The prediction of gptlab/roofline.py, for models whose layers all have the same window and no sinks.
// Every count is a whole number below 2^53, and the order of operations is Python's: the results are equal, not close.
"use strict";

const projectionsUp = (m) => (m.mlp === "swiglu" ? 2 : 1);

function parameters(m) {
  const c = m.n_embd, bias = m.bias ? 1 : 0, kv = 2 * m.n_kv_head * (c / m.n_head);
  const network = projectionsUp(m) * (c + bias) * m.n_inner + (m.n_inner + bias) * c;
  const blocks = m.n_layer * ((c + bias) * (c + kv) + (c + bias) * c + network);
  const norms = (2 * m.n_layer + 1) * (m.norm === "rms" ? 1 : 1 + bias) * c;
  const positions = m.position === "learned" ? m.context_length * c : 0;
  const table = m.vocab_size * c;
  return { blocks: blocks + norms, total: blocks + norms + positions + table * (m.tie_embeddings ? 1 : 2) };
}

function step(m, context, batch, size, bandwidth, peak) {
  const c = m.n_embd, head = c / m.n_head;
  const keys = m.n_layer * (m.window ? Math.min(m.window, context) : context);
  const rows = batch * c * (m.position === "learned" ? 2 : 1);
  const weightBytes = (parameters(m).blocks + m.vocab_size * c + rows) * size;
  const cacheBytes = 2 * batch * keys * m.n_kv_head * head * size;
  const blocks = 2 * m.n_layer * (c * (c + 2 * m.n_kv_head * head) + c * c + (projectionsUp(m) + 1) * c * m.n_inner);
  const reading = [weightBytes / bandwidth, cacheBytes / bandwidth];
  const computing = [batch * (blocks + 2 * c * m.vocab_size) / peak, batch * (4 * c * keys) / peak];
  const weightSeconds = Math.max(reading[0], computing[0]), cacheSeconds = Math.max(reading[1], computing[1]);
  const longer = weightSeconds >= cacheSeconds ? 0 : 1;
  const limit = reading[longer] >= computing[longer] ? ["weights", "cache"][longer] : "arithmetic";
  const seconds = weightSeconds + cacheSeconds;
  return { weightBytes, cacheBytes, weightSeconds, cacheSeconds, seconds, limit, tokensPerSecond: batch / seconds };
}

// One step of decoding: one new token for each of a few sequences, from embeddings to logits. It computes what
// gptlab.model.gpt.GPT computes with a cache; activations are float32, weights and caches as they are stored.
#include <algorithm>

#include "attention.h"
#include "pool.h"
#include "product.h"

struct Norm {
    const float *weight, *bias;  // (n_embd); bias may be absent
};

struct Layer {
    Norm before_attention, before_mlp;
    Product qkv, out, up, gate, down;  // gate: SwiGLU's alone
    Sight sight;
    int64_t limit;  // number of the table of angles by which sinks see a query, 0 where they see it as all others do
    float score_factor;
};

enum Activation : int32_t { GELU_TANH = 0, GELU = 1, RELU = 2, SILU = 3 };

struct Model {
    int64_t n_layer, n_embd, n_head, n_kv_head, head_dim, n_inner;
    Activation activation;
    int32_t rms;  // 1: RMS norms, 0: layer norms
    float eps, wpe_scale;
    int32_t cache;                        // FLOAT32 or BFLOAT16
    Product wte, wpe, head;               // rows of the first two are looked up; wpe may be absent
    const double *frequencies, *factors;  // (head_dim / 2): angle per position, factor of cos and sin; absent: no rotation
    const int64_t* limits;                // (n_limits): positions at which a table of angles stops; the first never does
    int64_t n_limits;
    Norm last;
    const Layer* layers;
};

struct Row {
    int64_t id, position;  // of the new token
};

namespace {

constexpr int MAX_BATCH = 64;

struct Input {  // of a product
    Buffer<float> rows;
    Rounded rounded;
};

struct Desk {  // of one thread
    Buffer<float> q, found;
    Input input;
};

struct Workspace {  // one step is computed at a time
    Buffer<float> residual, heads, inner, partials, angles;
    Input input;
    std::vector<Desk> desks;
    std::vector<int64_t> first_block;
    std::unique_ptr<std::atomic<int64_t>[]> handed_out;
    int64_t n_stages = 0;
};

void normalise(const Norm& norm, const Model& m, const float* x, float* y) {
    int64_t n = m.n_embd, i = 0;
    float mean = 0.0f;
    if (!m.rms) {
        Vec total = {};
        for (; i + WIDTH <= n; i += WIDTH) total += load(x + i);
        mean = sum(total);
        for (; i < n; i++) mean += x[i];
        mean /= n;
    }
    Vec squares = {};
    for (i = 0; i + WIDTH <= n; i += WIDTH) {
        Vec d = load(x + i) - mean;
        squares += d * d;
    }
    float variance = sum(squares);
    for (; i < n; i++) variance += (x[i] - mean) * (x[i] - mean);
    float factor = 1.0f / std::sqrt(variance / n + m.eps);
    for (i = 0; i < n; i++) y[i] = (x[i] - mean) * factor * norm.weight[i] + (norm.bias ? norm.bias[i] : 0.0f);
}

Vec sigmoid(Vec x) { return 1.0f / (1.0f + exp_of(-x)); }

Vec activate(Activation kind, Vec x) {
    switch (kind) {
        case GELU_TANH: return x * sigmoid(1.5957691216057308f * (x + 0.044715f * x * x * x));  // 1 + tanh u = 2 sigmoid 2u
        case GELU:
            for (int i = 0; i < WIDTH; i++) x[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678f));
            return x;
        case RELU: return x > 0.0f ? x : Vec{};
        case SILU: return x * sigmoid(x);
    }
    return x;
}

void activate(Activation kind, float* x, int64_t n) {
    int64_t i = 0;
    for (; i + WIDTH <= n; i += WIDTH) store(x + i, activate(kind, load(x + i)));
    if (i < n) {
        float rest[WIDTH] = {};
        std::copy(x + i, x + n, rest);
        store(rest, activate(kind, load(rest)));
        std::copy(rest, rest + (n - i), x + i);
    }
}

class Step {
   public:
    Step(const Model& m, const Row* rows, const Slots* slots, int batch, float* logits, Workspace& w, Pool& pool)
        : m(m), rows(rows), slots(slots), batch(batch), whole(any_whole(m)), width((m.n_head + 2 * m.n_kv_head) * m.head_dim), logits(logits), w(w), pool(pool) {
        residual = room(w.residual, batch * m.n_embd);
        heads = room(w.heads, batch * width);
        inner = room(w.inner, 2 * batch * m.n_inner);
        angles = room(w.angles, batch * std::max<int64_t>(m.n_limits, 1) * m.head_dim);
        w.first_block.resize(m.n_layer * (batch + 1));
        int64_t most = 0;
        for (int64_t l = 0; l < m.n_layer; l++) {
            int64_t* first = blocks_of(l);
            first[0] = 0;
            for (int b = 0; b < batch; b++) first[b + 1] = first[b] + (used(b, l) + BLOCK - 1) / BLOCK;
            most = std::max(most, first[batch]);
        }
        for (int b = 0; b < batch; b++)
            for (int64_t l = 0; l < m.n_layer; l++) slots[b * m.n_layer + l].positions[slot(b, l)] = rows[b].position;
        partials = room(w.partials, most * m.n_head * (m.head_dim + 2));
        if (w.n_stages < STAGES * m.n_layer + 1) {
            w.handed_out = std::make_unique<std::atomic<int64_t>[]>(STAGES * m.n_layer + 1);
            w.n_stages = STAGES * m.n_layer + 1;
        }
        for (int64_t i = 0; i < w.n_stages; i++) w.handed_out[i].store(0, std::memory_order_relaxed);
        // All memory is taken here: were there none, a thread could not say so.
        w.desks.resize(pool.wanted);
        const int64_t group = m.n_head / m.n_kv_head;
        auto reserve = [&](Input& input) {
            room(input.rows, batch * m.n_embd);
            if (whole) input.rounded.reserve(batch, {m.n_embd, m.n_inner});
        };
        for (Desk& desk : w.desks) {
            room(desk.q, 2 * group * m.head_dim);
            room(desk.found, group * (m.head_dim + 2));
            if (alone()) reserve(desk.input);
        }
        if (!alone()) reserve(w.input);
    }

    // What each thread does: the threads share the outputs of every product, and the rows between two of them.
    void run(int thread) {
        Desk& desk = w.desks[thread];
        Input& input = alone() ? desk.input : w.input;
        float* x = input.rows.data();
        const Tiles tiles(whole && tiles_wanted(batch), TILE_BYTES);
        Operand operand;
        auto prepare = [&](const Product& p, const float* from, auto&& compute) {
            operand = input.rounded.of(from, p.n_in, batch, p.whole(), p.kind == INT8);
            for (int b = alone() ? 0 : thread; b < batch; b += pool.size) {
                compute(b);
                operand.round(b);
            }
            if (!alone()) pool.meet();
            if (operand.tiles) {
                operand.fill_tiles(thread, pool.size);
                pool.meet();
            }
        };
        auto norm = [&](const Norm& norm) {
            return [&](int b) { normalise(norm, m, residual + b * m.n_embd, x + b * m.n_embd); };
        };
        auto product = [&](std::atomic<int64_t>& next, const Product& p, auto&& out) {
            share(next, p.n_out, [&](int64_t first, int64_t last) { multiply(p, first, last, operand, ahead(), out); }, PIECE);
        };
        auto put_into = [&](float* y, int64_t stride) {
            return [=](int64_t b, int64_t first, const float* values, int64_t n) { std::copy_n(values, n, y + b * stride + first); };
        };
        auto add = [&](int64_t b, int64_t first, const float* values, int64_t n) {
            for (int64_t i = 0; i < n; i++) residual[b * m.n_embd + first + i] += values[i];
        };
        if (thread == 0) embed();
        pool.meet();
        for (int64_t l = 0; l < m.n_layer; l++) {
            const Layer& layer = m.layers[l];
            std::atomic<int64_t>* next = &w.handed_out[STAGES * l];
            prepare(layer.qkv, x, norm(layer.before_attention));
            product(next[0], layer.qkv, put_into(heads, width));
            if (m.cache == FLOAT32) attention<float>(l, next[1], desk);
            else attention<uint16_t>(l, next[1], desk);
            prepare(layer.out, x, [&](int b) {
                for (int64_t h = 0; h < m.n_head; h++) merge(partial(l, b, h), blocks(l, b), m.head_dim, x + b * m.n_embd + h * m.head_dim);
            });
            product(next[2], layer.out, add);
            prepare(layer.up, x, norm(layer.before_mlp));
            share(next[3], m.n_inner, [&](int64_t first, int64_t last) { widen(layer, first, last, operand); }, PIECE);
            prepare(layer.down, inner, [](int) {});
            product(next[4], layer.down, add);
        }
        prepare(m.head, x, norm(m.last));
        product(w.handed_out[STAGES * m.n_layer], m.head, put_into(logits, m.head.n_out));
    }

   private:
    static constexpr int STAGES = 5;

    static bool any_whole(const Model& m) {
        return m.head.whole() || std::any_of(m.layers, m.layers + m.n_layer, [](const Layer& l) {
            return l.qkv.whole() || l.out.whole() || l.up.whole() || l.gate.whole() || l.down.whole();
        });
    }

    // A single row is so cheap between products that each thread computes it for itself.
    bool alone() const { return batch == 1; }

    // Outputs from a piece to the one that its thread takes next.
    int64_t ahead() const { return PIECE * pool.size; }

    int64_t used(int b, int64_t l) const { return std::min(rows[b].position + 1, slots[b * m.n_layer + l].capacity); }

    // Where the new token's key and value go: `Ring._slots`.
    int64_t slot(int b, int64_t l) const {
        int64_t capacity = slots[b * m.n_layer + l].capacity, sinks = m.layers[l].sight.sinks, position = rows[b].position;
        return position < capacity ? position : sinks + (position - sinks) % (capacity - sinks);
    }

    int64_t* blocks_of(int64_t l) const { return w.first_block.data() + l * (batch + 1); }
    int64_t blocks(int64_t l, int b) const { return blocks_of(l)[b + 1] - blocks_of(l)[b]; }

    // What the blocks of one head found: (blocks, head_dim + 2).
    float* partial(int64_t l, int b, int64_t head) const {
        return partials + (blocks_of(l)[b] * m.n_head + head * blocks(l, b)) * (m.head_dim + 2);
    }

    // Hand out n outputs, a piece at a time, to whichever thread is free; return when all are computed.
    template <class F>
    void share(std::atomic<int64_t>& next, int64_t n, F&& compute, int64_t piece) {
        for (int64_t first; (first = next.fetch_add(piece, std::memory_order_relaxed)) < n;) compute(first, std::min(first + piece, n));
        pool.meet();
    }

    void embed() {
        for (int b = 0; b < batch; b++) {
            float* x = residual + b * m.n_embd;
            with_weights(m.wte, [&](auto table) {
                for (int64_t i = 0; i < m.n_embd; i++) x[i] = table.one(rows[b].id, i);
            });
            if (m.wpe.weight)
                with_weights(m.wpe, [&](auto table) {
                    for (int64_t i = 0; i < m.n_embd; i++) x[i] += table.one(rows[b].position, i) * m.wpe_scale;
                });
            int64_t half = m.head_dim / 2;
            for (int64_t t = 0; m.frequencies && t < m.n_limits; t++) {
                float* table = angles + (b * m.n_limits + t) * m.head_dim;
                double position = static_cast<double>(std::min(rows[b].position, m.limits[t]));
                for (int64_t i = 0; i < half; i++) {
                    table[i] = static_cast<float>(std::cos(position * m.frequencies[i]) * m.factors[i]);
                    table[half + i] = static_cast<float>(std::sin(position * m.frequencies[i]) * m.factors[i]);
                }
            }
        }
    }

    void turn(float* x, int b, int64_t limit) const {
        if (!m.frequencies) return;
        const float* table = angles + (b * m.n_limits + limit) * m.head_dim;
        rotate(x, table, table + m.head_dim / 2, m.head_dim / 2);
    }

    // One piece of work is a block of the slots of one key head of one sequence, with all queries that share the head.
    template <class T>
    void attention(int64_t l, std::atomic<int64_t>& next, Desk& desk) {
        const Layer& layer = m.layers[l];
        const int64_t d = m.head_dim, group = m.n_head / m.n_kv_head, *first = blocks_of(l);
        float *q = desk.q.data(), *found = desk.found.data();
        share(next, first[batch] * m.n_kv_head, [&](int64_t item, int64_t) {
            int b = 0;
            while (first[b + 1] * m.n_kv_head <= item) b++;
            int64_t within = item - first[b] * m.n_kv_head, head = within / blocks(l, b), block = within % blocks(l, b);
            const Slots& s = slots[b * m.n_layer + l];
            int64_t position = rows[b].position, begin = block * BLOCK, end = std::min(begin + BLOCK, used(b, l));
            T* k = static_cast<T*>(s.k) + head * s.stride * d;
            T* v = static_cast<T*>(s.v) + head * s.stride * d;
            const float* mine = heads + b * width;

            int64_t to = slot(b, l);
            if (begin <= to && to < end) {  // the new token's key and value
                float* key = q;
                std::copy_n(mine + (m.n_head + head) * d, d, key);
                turn(key, b, 0);
                for (int64_t i = 0; i < d; i++) {
                    put(k + to * d + i, key[i]);
                    put(v + to * d + i, mine[(m.n_head + m.n_kv_head + head) * d + i]);
                }
            }
            float factor = layer.score_factor / std::sqrt(static_cast<float>(d));
            bool apart = layer.limit > 0;
            for (int64_t i = 0; i < group * d; i++) q[i] = q[group * d + i] = mine[head * group * d + i] * factor;
            for (int64_t h = 0; h < group; h++) {
                turn(q + h * d, b, 0);
                if (apart) turn(q + (group + h) * d, b, layer.limit);
            }
            attend(q, apart ? q + group * d : nullptr, group, d, k, v, s.positions, begin, end, position, layer.sight, found);
            for (int64_t h = 0; h < group; h++)
                std::copy_n(found + h * (d + 2), d + 2, partial(l, b, head * group + h) + block * (d + 2));
        }, 1);
    }

    // The first half of the feed-forward network, with its activation.
    void widen(const Layer& layer, int64_t first, int64_t last, const Operand& operand) {
        auto to = [&](float* y) {
            return [=, this](int64_t b, int64_t n, const float* values, int64_t count) { std::copy_n(values, count, y + b * m.n_inner + n); };
        };
        float* gates = inner + batch * m.n_inner;
        float* active = layer.gate.weight ? gates : inner;
        multiply(layer.up, first, last, operand, ahead(), to(inner));
        if (layer.gate.weight) multiply(layer.gate, first, last, operand, ahead(), to(gates));
        for (int b = 0; b < batch; b++) {
            float* y = inner + b * m.n_inner;
            activate(m.activation, active + b * m.n_inner + first, last - first);
            if (layer.gate.weight)
                for (int64_t n = first; n < last; n++) y[n] *= gates[b * m.n_inner + n];
        }
    }

    const Model& m;
    const Row* rows;
    const Slots* slots;
    const int batch;
    const bool whole;     // whether there are weights that are whole numbers
    const int64_t width;  // of queries, keys and values together
    float* logits;
    Workspace& w;
    Pool& pool;
    float *residual, *heads, *inner, *partials, *angles;
};

}  // namespace

// Read one token in each of `batch` sequences, rows (batch) and slots (batch, n_layer); write logits (batch, n_vocab).
// The new tokens' keys, values and positions go into the slots, which must have room for them. Returns 0, or 1 where there
// is not enough memory.
extern "C" int32_t gptlab_step(const Model* model, const Row* rows, const Slots* slots, int32_t batch, int32_t n_threads, float* logits) try {
    static Workspace& workspace = *new Workspace;
    std::lock_guard<std::mutex> lock(one_at_a_time());
    Pool& pool = Pool::of(n_threads);
    Step step(*model, rows, slots, batch, logits, workspace, pool);
    pool.run([&](int thread) { step.run(thread); });
    return 0;
} catch (const std::exception&) {
    return 1;
}

extern "C" int32_t gptlab_largest_batch() { return MAX_BATCH; }

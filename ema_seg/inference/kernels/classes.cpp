// The class with the highest logit of each pixel, with a running maximum: no logits at the image's resolution are kept.
//
// A tie goes to the first class and NaN counts as the highest value, as in torch.argmax. Upsampled logits have the bits
// of PyTorch's bilinear interpolation with aligned corners: the operations below are in its order, with the same fused
// multiply-adds, so this file must be compiled with -ffp-contract=off.

#include <algorithm>
#include <cstdint>
#include <new>
#include <vector>

namespace {

constexpr int64_t BLOCK = 1024;  // pixels whose maxima stay in the first-level cache

// Two neighbours of each output position in one dimension, and their weights.
struct Neighbours {
    std::vector<int32_t> first, second;
    std::vector<float> first_weight, second_weight;

    Neighbours(int64_t inputs, int64_t outputs, int64_t used)
        : first(used), second(used), first_weight(used), second_weight(used) {
        const float step = outputs > 1 ? static_cast<float>(inputs - 1) / static_cast<float>(outputs - 1) : 0.0f;
        for (int64_t i = 0; i < used; ++i) {
            const float position = step * static_cast<float>(i);
            first[i] = static_cast<int32_t>(std::min<int64_t>(static_cast<int64_t>(position), inputs - 1));
            second[i] = first[i] + (first[i] < inputs - 1 ? 1 : 0);
            second_weight[i] = std::min(std::max(position - static_cast<float>(first[i]), 0.0f), 1.0f);
            first_weight[i] = 1.0f - second_weight[i];
        }
    }
};

struct Highest {
    float value[BLOCK];
    int32_t index[BLOCK];

    void start(int64_t pixels) {
        for (int64_t i = 0; i < pixels; ++i) index[i] = -1;
        for (int64_t i = 0; i < pixels; ++i) value[i] = 0.0f;
    }

    void offer(int64_t i, float logit, int32_t label) {
        const bool higher = !(logit <= value[i]) & (value[i] == value[i]);
        const bool better = higher | (index[i] < 0);
        value[i] = better ? logit : value[i];
        index[i] = better ? label : index[i];
    }

    void write(uint8_t *ids, int64_t pixels) const {
        for (int64_t i = 0; i < pixels; ++i) ids[i] = static_cast<uint8_t>(index[i]);
    }
};

}  // namespace

// Writes the classes of logits classes x pixels, both dense.
extern "C" int highest_classes(const float *logits, int64_t classes, int64_t pixels, uint8_t *ids, int64_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t start = 0; start < pixels; start += BLOCK) {
        const int64_t count = std::min(BLOCK, pixels - start);
        Highest highest;
        highest.start(count);
        for (int64_t label = 0; label < classes; ++label) {
            const float *row = logits + label * pixels + start;
            for (int64_t i = 0; i < count; ++i) highest.offer(i, row[i], static_cast<int32_t>(label));
        }
        highest.write(ids + start, count);
    }
    return 0;
}

// Writes the classes of logits that are upsampled from classes x height x width, dense, to full_height x full_width.
// Only the upper left out_height x out_width pixels are computed. PyTorch interpolates tensors in channels-last layout
// from four neighbours at once (four_taps), others first along the rows. Returns 1 if memory runs out.
extern "C" int highest_upsampled_classes(
    const float *logits, int64_t classes, int64_t height, int64_t width, int64_t full_height, int64_t full_width,
    int64_t out_height, int64_t out_width, int64_t four_taps, uint8_t *ids, int64_t threads) try {
    const Neighbours rows(height, full_height, out_height), columns(width, full_width, out_width);
    // Values of a logit row at the output's columns: interpolated, or those of both neighbours.
    const int64_t parts = four_taps ? 2 : 1, line = parts * out_width, plane = classes * line;
    std::vector<float> memory(static_cast<size_t>(threads * 2 * plane));
    const int64_t share = (out_height + threads - 1) / threads;

#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int64_t thread = 0; thread < threads; ++thread) {
        float *buffers[2] = {memory.data() + thread * 2 * plane, memory.data() + (thread * 2 + 1) * plane};
        int64_t held[2] = {-1, -1};
        const auto expand = [&](int64_t row, float *into) {
            for (int64_t label = 0; label < classes; ++label) {
                const float *from = logits + (label * height + row) * width;
                float *to = into + label * line;
                if (four_taps) {
                    for (int64_t x = 0; x < out_width; ++x) to[x] = from[columns.first[x]];
                    for (int64_t x = 0; x < out_width; ++x) to[out_width + x] = from[columns.second[x]];
                } else {
                    for (int64_t x = 0; x < out_width; ++x)
                        to[x] = __builtin_fmaf(
                            from[columns.second[x]], columns.second_weight[x],
                            from[columns.first[x]] * columns.first_weight[x]);
                }
            }
        };
        Highest highest;
        for (int64_t y = thread * share; y < std::min(out_height, (thread + 1) * share); ++y) {
            const int64_t above = rows.first[y], below = rows.second[y];
            if (held[1] == above) {
                std::swap(buffers[0], buffers[1]);
                std::swap(held[0], held[1]);
            }
            if (held[0] != above) expand(held[0] = above, buffers[0]);
            if (held[1] != below) expand(held[1] = below, buffers[1]);
            const float top = rows.first_weight[y], bottom = rows.second_weight[y];

            for (int64_t start = 0; start < out_width; start += BLOCK) {
                const int64_t count = std::min(BLOCK, out_width - start);
                const float *left = columns.first_weight.data() + start, *right = columns.second_weight.data() + start;
                highest.start(count);
                for (int64_t label = 0; label < classes; ++label) {
                    const float *high = buffers[0] + label * line + start, *low = buffers[1] + label * line + start;
                    if (four_taps) {
                        const float *high_right = high + out_width, *low_right = low + out_width;
                        for (int64_t i = 0; i < count; ++i) {
                            float logit = top * left[i] * high[i];
                            logit = __builtin_fmaf(top * right[i], high_right[i], logit);
                            logit = __builtin_fmaf(bottom * left[i], low[i], logit);
                            logit = __builtin_fmaf(bottom * right[i], low_right[i], logit);
                            highest.offer(i, logit, static_cast<int32_t>(label));
                        }
                    } else {
                        for (int64_t i = 0; i < count; ++i)
                            highest.offer(
                                i, __builtin_fmaf(low[i], bottom, high[i] * top), static_cast<int32_t>(label));
                    }
                }
                highest.write(ids + y * out_width + start, count);
            }
        }
    }
    return 0;
} catch (const std::bad_alloc &) {
    return 1;
}

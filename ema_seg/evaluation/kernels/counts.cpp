// Counts of an image's pixels by true and predicted class, and of its objects by size (see strata.py).

#include <cstdint>
#include <new>
#include <vector>

namespace {

// A run of equal labels in a row. Runs of one object form a tree, whose root holds the object's pixels.
struct Run {
    int32_t start, end;  // columns
    int32_t parent;
    uint8_t label;
    int64_t size, chosen;
};

int32_t find_root(std::vector<Run> &runs, int32_t index) {
    while (runs[index].parent != index) {
        runs[index].parent = runs[runs[index].parent].parent;
        index = runs[index].parent;
    }
    return index;
}

// Joins runs of a row with those of the row above that touch them, diagonally too.
void join(std::vector<Run> &runs, int32_t above, int32_t row, int32_t end) {
    int32_t upper = above;
    for (int32_t lower = row; lower < end; ++lower) {
        while (upper < row && runs[upper].end < runs[lower].start) ++upper;
        for (int32_t i = upper; i < row && runs[i].start <= runs[lower].end; ++i) {
            if (runs[i].label != runs[lower].label) continue;
            const int32_t a = find_root(runs, i), b = find_root(runs, lower);
            if (a != b) runs[a < b ? b : a].parent = a < b ? a : b;
        }
    }
}

// Finds the objects of a map of labels (none: no object), in which some pixels are chosen, and calls each(label, size,
// chosen pixels).
template <typename Label, typename Chosen, typename Each>
void each_object(int64_t height, int64_t width, int none, Label label_at, Chosen chosen_at, Each each) {
    std::vector<Run> runs;
    int32_t above = 0, row = 0;
    for (int64_t y = 0; y < height; ++y) {
        const int64_t offset = y * width;
        int64_t x = 0;
        while (x < width) {
            const int label = label_at(offset + x);
            const int64_t start = x;
            int64_t chosen = 0;
            do {
                chosen += chosen_at(offset + x);
                ++x;
            } while (x < width && label_at(offset + x) == label);
            if (label == none) continue;
            runs.push_back({static_cast<int32_t>(start), static_cast<int32_t>(x), static_cast<int32_t>(runs.size()),
                            static_cast<uint8_t>(label), x - start, chosen});
        }
        const int32_t end = static_cast<int32_t>(runs.size());
        join(runs, above, row, end);
        above = row;
        row = end;
    }
    for (int32_t i = static_cast<int32_t>(runs.size()) - 1; i >= 0; --i) {
        if (runs[i].parent == i) continue;
        Run &root = runs[find_root(runs, i)];
        root.size += runs[i].size;
        root.chosen += runs[i].chosen;
    }
    for (int32_t i = 0; i < static_cast<int32_t>(runs.size()); ++i)
        if (runs[i].parent == i) each(runs[i].label, runs[i].size, runs[i].chosen);
}

}  // namespace

// Adds the pixels to a matrix classes x classes, but those of the truth ignored. Returns 1 if a label is no class.
extern "C" int count_pixels(
    const uint8_t *prediction, const uint8_t *truth, int64_t height, int64_t width, int64_t classes, int64_t ignored,
    int64_t *matrix) {
    const int64_t pixels = height * width;
    for (int64_t i = 0; i < pixels;) {
        const int64_t start = i;
        do ++i;
        while (i < pixels && truth[i] == truth[start] && prediction[i] == prediction[start]);
        if (truth[start] == ignored) continue;
        if (truth[start] >= classes || prediction[start] >= classes) return 1;
        matrix[truth[start] * classes + prediction[start]] += i - start;
    }
    return 0;
}

// Adds intersection and union, 2 x 3 x classes: of objects under limits[0] pixels, under limits[1], and from there on.
// Returns 1 if memory runs out, 2 if a label is no class.
extern "C" int count_objects(
    const uint8_t *prediction, const uint8_t *truth, int64_t height, int64_t width, int64_t classes, int64_t ignored,
    const int64_t *limits, int64_t *counts) try {
    int64_t *intersection = counts, *unions = counts + 3 * classes;
    const auto stratum = [&](int64_t size) { return (size >= limits[0]) + (size >= limits[1]); };
    const int none = static_cast<int>(ignored);
    bool outside = false;
    each_object(
        height, width, none, [&](int64_t i) { return static_cast<int>(truth[i]); },
        [&](int64_t i) { return truth[i] == prediction[i]; },
        [&](int label, int64_t size, int64_t right) {
            if ((outside |= label >= classes)) return;
            intersection[stratum(size) * classes + label] += right;
            unions[stratum(size) * classes + label] += size;
        });
    // Ignored pixels belong to no predicted object. Of the others only wrong ones are not in the union yet.
    each_object(
        height, width, none, [&](int64_t i) { return truth[i] == ignored ? none : static_cast<int>(prediction[i]); },
        [&](int64_t i) { return truth[i] != prediction[i]; },
        [&](int label, int64_t size, int64_t wrong) {
            if ((outside |= label >= classes)) return;
            unions[stratum(size) * classes + label] += wrong;
        });
    return outside ? 2 : 0;
} catch (const std::bad_alloc &) {
    return 1;
}

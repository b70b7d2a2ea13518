"""The published evaluation protocols, one loop at a time, from their description.

Nothing here is shared with `alignps_jax.metrics`: plain dictionaries in, scikit-learn's average
precision and normalization, float32 dot products image by image. `found` maps an image name to
(boxes [n, 4], scores [n], embeddings [n, D]). Where the released scripts crash, the case is decided
as the documentation of `alignps_jax.metrics` says.
"""

import itertools

import numpy as np
from sklearn.metrics import average_precision_score
from sklearn.preprocessing import normalize


def overlap(a, b, extra=0.0):
    """IoU of two boxes, `extra` added to all widths and heights."""
    wide = min(a[2], b[2]) - max(a[0], b[0]) + extra
    high = min(a[3], b[3]) - max(a[1], b[1]) + extra
    both = max(0.0, wide) * max(0.0, high)
    areas = [(box[2] - box[0] + extra) * (box[3] - box[1] + extra) for box in (a, b)]
    return both / (areas[0] + areas[1] - both)


def query_embedding(found_in_photo, query_box):
    boxes, _, embeddings = found_in_photo
    if len(boxes) == 0:
        return None
    overlaps = [overlap(box, query_box, extra=1.0) for box in boxes]
    return normalize(embeddings[[int(np.argmax(overlaps))]])[0]


def search_one(query, entries, found, threshold, photo=None, context=None):
    """AP and the ranked truth of one query; entries are (image name, person's box or None)."""
    truth, similarity = [], []
    holding = hit = 0
    searched = []
    for name, person in entries:
        holding += person is not None
        boxes, scores, embeddings = found[name]
        confident = scores >= threshold
        if query is None or not confident.any():
            continue
        embeddings = normalize(embeddings[confident])
        searched.append((person, boxes[confident], embeddings, embeddings.dot(query)))
    if context is not None and searched:
        rescore_in_context(query, searched, found[photo], threshold, *context)
    for person, boxes, _, cosines in searched:
        labels = [0] * len(boxes)
        if person is not None:
            w, h = int(person[2] - person[0]), int(person[3] - person[1])
            needed = min(0.5, w * h / ((w + 10) * (h + 10)))
            by_similarity = np.argsort(cosines)[::-1]
            cosines, boxes = cosines[by_similarity], boxes[by_similarity]
            for place, box in enumerate(boxes):
                if overlap(box, person) >= needed:
                    labels[place] = 1
                    hit += 1
                    break
        truth.extend(labels)
        similarity.extend(cosines)
    truth, similarity = np.array(truth, dtype=int), np.array(similarity, dtype=np.float32)
    precision = average_precision_score(truth, similarity) * hit / holding if hit else 0.0
    return precision, truth[np.argsort(similarity)[::-1]]


def rescore_in_context(query, searched, found_in_photo, threshold, k1, k2):
    """Context bipartite graph matching, by trying all the matchings of an image; in place."""
    _, scores, embeddings = found_in_photo
    embeddings = normalize(embeddings)
    own = int(np.argmin(np.abs(embeddings - query).sum(axis=1)))
    others = [i for i in np.argsort(-scores, kind="stable") if i != own and scores[i] >= threshold]
    people = embeddings[[own, *others[: k2 - 1]]].astype(np.float64)
    closest = sorted(range(len(searched)), key=lambda i: -searched[i][3].max())[:k1]
    for number in closest:
        _, _, there, cosines = searched[number]
        weights = people @ there.astype(np.float64).T
        pairs = min(weights.shape)
        # Injections of the smaller side into the larger one.
        best, chosen = -np.inf, None
        for side in itertools.permutations(range(max(weights.shape)), pairs):
            if len(people) <= len(there):
                matching = list(zip(range(pairs), side, strict=True))
            else:
                matching = list(zip(side, range(pairs), strict=True))
            total = sum(weights[i, j] for i, j in matching)
            if total > best:
                best, chosen = total, dict(matching)
        if 0 in chosen:
            cosines[chosen[0]] = best


def search(queries, found, threshold, context=None):
    """mAP, {k: top-k}, AP of each query, ranked truth of each query.

    `queries`: (photo, the person's box, gallery), the gallery a list of (image name, box or None).
    """
    results = [
        search_one(query_embedding(found[photo], box), gallery, found, threshold, photo, context)
        for photo, box, gallery in queries
    ]
    aps, ranked = (list(part) for part in zip(*results, strict=True))
    top = {k: np.mean([min(1, truth[:k].sum()) for truth in ranked]) for k in (1, 5, 10)}
    return np.mean(aps), top, np.array(aps), ranked


def detection(people, found, threshold, iou_threshold=0.5):
    """Recall and AP; `people` maps an image name to boxes [G, 4]."""
    truth, confidence = [], []
    total = hits = 0
    for name, persons in people.items():
        boxes, scores, _ = found[name]
        boxes, scores = boxes[scores >= threshold], scores[scores >= threshold]
        total += len(persons)
        ious = np.zeros((len(persons), len(boxes)), dtype=np.float32)
        for i, person in enumerate(persons):
            for j, box in enumerate(boxes):
                ious[i, j] = overlap(person, box)
        for j, score in enumerate(scores):
            correct = False
            for i in range(len(persons)):
                is_best = np.argmax(ious[:, j]) == i and np.argmax(ious[i]) == j
                correct = correct or (is_best and ious[i, j] >= iou_threshold)
            truth.append(correct)
            confidence.append(score)
            hits += correct
    recall = hits / total if total else 0.0
    return recall, average_precision_score(truth, confidence) * recall if hits else 0.0

"""Heads on bags: a patient is judged by all its cells at once, weighed by learned attention.

Attention-based multiple-instance learning with gates (Ilse, Tomczak and Welling, Attention-based Deep
Multiple Instance Learning, ICML 2018, arXiv:1802.04712). With the embedding h of each cell (the last hidden
layer),

    attention  a = softmax over the cells of  w . (tanh(V h) * sigmoid(U h))
    logit        = c . (sum of a h) + d  =  sum of a (c . h + d)

so a head on bags is a head on single cells (the parenthesis) and an attention, and what a cell adds to the
patient's logit can be read off. Without a hidden layer the cells weigh the same: a logistic regression on the
mean of their features.

Heads train as a stack (see `aplsmear.heads.stack`). A step sees some of a patient's cells, drawn anew each
time: patients are few, and no head should know one of them by its crowd.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
from scipy.special import erf, expit, softmax

from aplsmear.heads.head import Head, Job, Recipe, TrainingItems, parameters
from aplsmear.heads.stack import JUDGED, Judged, Lane, Material, Stack, by_step, judge_heads, train_heads
from aplsmear.heads.stack_graphs import Bags, judge_bags_graph, train_bags_graph


def attend(head: Head, features: np.ndarray) -> tuple[float, np.ndarray]:
    """What a head on bags says of one item, and how much it looked at each of its images.

    Args:
        head: of `train_bags`.
        features: float (images, channels), at least one image; as the backbone gives them.

    Returns:
        The probability of the positive class, and the attention, float64 (images,): positive numbers that sum
        to 1; of a mean of heads, the mean of theirs.
    """
    signal = features.astype(np.float64)
    attention = np.full((len(signal), 1), 1 / len(signal))
    last = len(head.kernels) - 1
    for layer, (kernel, bias) in enumerate(zip(head.kernels, head.biases, strict=True)):
        if layer == last and head.attention:
            gates, offsets, weights = head.attention
            tanh, sigmoid = np.split(signal @ gates.astype(np.float64) + offsets, 2, axis=1)
            attention = softmax((np.tanh(tanh) * expit(sigmoid)) @ weights.astype(np.float64), axis=0)
        signal = signal @ kernel.astype(np.float64) + bias
        signal = signal if layer == last else _activated(signal, head.activation)
    return float(expit((attention * signal).sum(axis=0).mean())), attention.mean(axis=1)


def bag_parameters(recipe: Recipe, channels: int) -> int:
    """The number of weights of a head on bags of features of so many channels."""
    attention = (recipe.width + 1) * 2 * recipe.width + recipe.width if recipe.depth else 0
    return parameters(recipe, channels) + attention


def train_bags(jobs: Sequence[Job], material: Material) -> list[Head]:
    """Train heads on bags; see `aplsmear.heads.stack.train_heads`."""
    return train_heads(jobs, material, BagStack)


def judge_bags(jobs: Sequence[Job], material: Material, patience: int) -> list[Judged]:
    """Train heads on bags and judge them on whole bags; see `aplsmear.heads.stack.judge_heads`."""
    return judge_heads(jobs, material, patience, BagStack)


class BagStack(Stack):
    """A stack of heads on bags; behind the weights of the layers come those of the attention."""

    def _weights(self) -> list[np.ndarray]:
        """Kernel and bias of each layer; with hidden ones, of the gates; and the weights of the attention."""
        if not self.recipe.depth:
            return super()._weights()
        lanes, models = self.place.shape
        gates = np.zeros((lanes, models, self.width, 2, self.width), np.float32)
        weights = np.zeros((lanes, models, self.width, 1), np.float32)
        layers = super()._weights()
        for lane, slot in np.argwhere(self.place >= 0):
            place = self.place[lane, slot]
            width = self.jobs[place].recipe.width
            limit = np.sqrt(6 / (2 * width))  # Glorot and Bengio 2010, as for the layers
            gates[lane, slot, :width, :, :width] = self.randoms[place].uniform(
                -limit, limit, (width, 2, width)
            )
            limit = np.sqrt(6 / (width + 1))
            weights[lane, slot, :width] = self.randoms[place].uniform(-limit, limit, (width, 1))
        biases = np.zeros((lanes, models, 1, 2 * self.width), np.float32)
        return [*layers, gates.reshape(lanes, models, self.width, 2 * self.width), biases, weights]

    def _epoch(self, epoch: int) -> None:
        """Train all models for one epoch."""
        self._pace(epoch)
        batch, lanes = self.recipe.batch, len(self.lanes)
        rows = np.zeros((lanes, self.steps * batch, self.bag), np.int64)
        size = np.zeros((lanes, self.steps * batch), np.int32)
        target = np.zeros((lanes, self.steps * batch), np.float32)
        for number, lane in enumerate(self.lanes):
            rows[number], size[number], target[number] = draw_bags(lane, self.steps * batch, self.bag)
        share = self._shares()
        train = train_bags_graph(self.recipe.depth)
        for steps, bags in self._blocks(rows, size, target, batch):
            train(self.state, bags, share[steps], self.knobs, np.array([self.rng, self.taken], np.int32))
            self.taken += len(bags.size)

    def _judge(self) -> tuple[np.ndarray, np.ndarray]:
        """Loss on each held-out fold (lanes, models, folds), and logits (lanes, models, judged items)."""
        each, start = sizes(self.lanes[0].items)
        judged = [lane.judged for lane in self.lanes]
        images = max(int(each[np.concatenate(judged)].max(initial=1)), 1)
        batch = max(JUDGED // images, 1)
        count = -(-max(map(len, judged)) // batch) * batch
        folds = max(len(lane.held_out) for lane in self.lanes)
        rows = np.zeros((len(self.lanes), count, images), np.int64)
        size = np.ones((len(self.lanes), count), np.int32)
        target = np.zeros(size.shape, np.float32)
        fold = np.zeros((*size.shape, folds), np.float32)
        for number, lane in enumerate(self.lanes):
            mine = len(lane.judged)
            rows[number] = lane.items.row[start[lane.judged[0] if mine else 0]]
            if mine:
                size[number, :mine] = each[lane.judged]
                images_of = start[lane.judged, None] + filled(np.arange(images)[None], each[lane.judged])
                rows[number, :mine] = lane.items.row[images_of]
            target[number, :mine] = lane.items.label[lane.judged]
            for place, held_out in enumerate(lane.held_out):
                fold[number, :mine, place] = lane.items.fold[lane.judged] == held_out
        total = np.zeros((*self.place.shape, folds), np.float64)
        logits = []
        judge, weight = judge_bags_graph(self.recipe.depth), by_step(fold, batch)
        for steps, bags in self._blocks(rows, size, target, batch):
            loss, logit = judge(self.state[0], bags, weight[steps], self.knobs)
            total += loss.numpy().sum(axis=0, dtype=np.float64)
            logits += list(logit.numpy())
        return total / np.maximum(fold.sum(axis=1)[:, None], 1), np.concatenate(logits, axis=2)

    def _blocks(
        self, rows: np.ndarray, size: np.ndarray, target: np.ndarray, batch: int
    ) -> Iterator[tuple[slice, Bags]]:
        """Steps of so many items, and what a graph takes of them.

        Args:
            rows: int64 (lanes, items, images).
            size: int32 (lanes, items).
            target: float32 (lanes, items).
            batch: items of one step.
        """
        stepped, size, target = (by_step(each, batch) for each in (rows, size, target))
        flat = stepped.reshape(*stepped.shape[:2], -1)
        for steps, x, index in self.table.blocks(flat, self.sets):
            yield steps, Bags(x, index, size[steps], target[steps])

    def _head(self, lane: int, slot: int) -> Head:
        head = super()._head(lane, slot)
        if not self.recipe.depth:
            return head
        width = self.jobs[self.place[lane, slot]].recipe.width
        rate = self.knobs.rate[lane, slot]
        gates, biases, weights = (rate * each[lane, slot].numpy() for each in self.state[0][-3:])
        gates, biases = (each.reshape(-1, 2, self.width)[:, :, :width] for each in (gates, biases))
        attention = (gates[:width].reshape(width, -1), biases.reshape(-1), weights[:width])
        if not all(np.isfinite(each).all() for each in attention):
            raise FloatingPointError("an attention came out with weights that are not finite")
        return replace(head, attention=attention)


def draw_bags(lane: Lane, count: int, images: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The next so many items of a lane, each with so many of its images by lot, or all that it has.

    Returns:
        int64 (count, images), view rows; int64 (count,), how many of these count (the first fills the rest);
        int8 (count,), labels.
    """
    items, order = lane.items, lane.order(count)
    each, start = (of[order] for of in sizes(items))
    lots = lane.random.random((count, max(int(each.max()), images)))
    lots[np.arange(lots.shape[1]) >= each[:, None]] = 2
    image = start[:, None] + filled(np.argsort(lots, axis=1)[:, :images], each)
    seen = np.minimum(lane.views, items.views[image])
    view = (lane.random.random(image.shape) * (seen + 1)).astype(np.int64)
    return items.row[image] + view, np.minimum(each, images), items.label[order]


def filled(places: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Places within bags (items, images), those beyond an item's size replaced by its first."""
    return np.where(np.arange(places.shape[1]) < size[:, None], places, places[:, :1])


def sizes(items: TrainingItems) -> tuple[np.ndarray, np.ndarray]:
    """Of each item, how many images it has and where the first stands, int64 (items,)."""
    size = np.ones(len(items.label), np.int64) if items.size is None else items.size
    return size, np.cumsum(size) - size


def _activated(signal: np.ndarray, activation: str) -> np.ndarray:
    if activation == "tanh":
        return np.asarray(np.tanh(signal))
    normal = (1 + erf(signal / np.sqrt(2))) / 2 if activation == "gelu" else signal > 0
    return np.asarray(signal * normal)

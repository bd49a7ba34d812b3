"""Requests into batches: groups that share settings, chunks that fit, one seed for each batch."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from spo.records import GenerateRequest, Sampling

_T = TypeVar("_T")
_K = TypeVar("_K")
_P = TypeVar("_P")
_M = TypeVar("_M")


def grouped(items: Sequence[_T], key: Callable[[_T], _K]) -> list[tuple[_K, list[int]]]:
    """Indices of the items of each key, in order of first appearance."""
    groups: defaultdict[_K, list[int]] = defaultdict(list)
    for i, item in enumerate(items):
        groups[key(item)].append(i)
    return list(groups.items())


def chunks(indices: list[int], size: int) -> Iterator[list[int]]:
    """Runs of at most `size` indices."""
    for start in range(0, len(indices), size):
        yield indices[start : start + size]


def seed_sampling(requests: Sequence[GenerateRequest]) -> None:
    """Seed sampling from the requests' own seeds, so that the same batch gives the same answers."""
    seeds = [request.sampling.seed for request in requests]
    if any(seed is not None for seed in seeds):
        digest = hashlib.sha256(repr(seeds).encode()).digest()
        torch.manual_seed(int.from_bytes(digest[:8], "big") % (2**63))


def sampling_options(sampling: Sampling, image_token_id: int | None) -> dict[str, Any]:
    """The same sampling in the words of Transformers' `generate`.

    The image placeholder is never sampled: an answer that holds a placeholder for pixels could be
    neither scored nor learned from.
    """
    suppressed = {} if image_token_id is None else {"suppress_tokens": [image_token_id]}
    if sampling.temperature == 0:
        greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return greedy | suppressed
    return suppressed | {
        "do_sample": True,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0,
    }


def made_ahead(parts: Sequence[_P], make: Callable[[_P], _M]) -> Iterator[tuple[_P, _M]]:
    """Each part with what is made of it, the next one made by a thread while one is used.

    An error of `make` comes out where its part would have come.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="ahead") as thread:
        following = [thread.submit(make, part) for part in parts[:1]]
        for number, part in enumerate(parts):
            made = following.pop().result()
            following += [thread.submit(make, after) for after in parts[number + 1 : number + 2]]
            yield part, made

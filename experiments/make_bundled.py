"""Makes the traces that come with the package, and the published numbers that the tests compare with.

    python -m experiments.make_bundled GPT_OSS_20B BIGMOE_ON_EDGE --data DIR --tests DIR [--overwrite]

GPT_OSS_20B holds gpt_oss_20b_decode.npz and LICENSE (from AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting),
BIGMOE_ON_EDGE holds {qwen,gptoss}.route.csv.xz, {qwen,gptoss}-curve.csv and LICENSE (from Helldez/BigMoeOnEdge,
docs/bench-data).
The routing of specmd-reference is recorded anew. Takes about 40 seconds. Expected: 5.1 MB for gpt-oss-20b, 0.3 MB for
the two phone traces, 0.5 MB for specmd-reference.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np

from experiments.common.command_line import bare_parser, main_guard
from specmd_jax.errors import SpecmdError
from specmd_jax.files import file_sha256, whole_file
from specmd_jax.trace import read_bigmoe, save_trace, select_requests
from specmd_jax.trace.importers.fingerprint import import_fingerprint
from specmd_jax.types import Trace

HEAD_TOKENS = 8000  # the file's first requests up to here stay together at the start
PHONE_TRACES = {
    "qwen": ("bigmoe-qwen3-30b-a3b.npz", "Qwen3-30B-A3B", "Q4_K_M, top-6 instead of the model's 8", 4000),
    "gptoss": ("bigmoe-gpt-oss-120b.npz", "gpt-oss-120b", "Q4_K_M, top-2 instead of the model's 4", 3000),
}
"""Upstream name -> file, model, what the run changed, MiB of its cache (global LRU)."""


def balanced_requests(trace: Trace, tokens: int) -> list[int]:
    """Gives requests to keep, in file order: the first ones up to `HEAD_TOKENS`, then as even a share as possible.

    The next one always comes from the dataset with the fewest tokens so far, in it from the category with the fewest,
    in that the first in the file; it stops at the first that would exceed ``tokens``.
    """
    groups = [(row["dataset"], row["category"]) for row in trace.meta["requests"]]
    head = int(np.searchsorted(np.cumsum(trace.lengths), HEAD_TOKENS)) + 1
    chosen = list(range(head))
    waiting = list(range(head, trace.requests))
    by_dataset = {dataset: 0 for dataset, _ in groups}
    by_group = dict.fromkeys(groups, 0)
    for request in chosen:
        by_dataset[groups[request][0]] += int(trace.lengths[request])
        by_group[groups[request]] += int(trace.lengths[request])
    while waiting:
        request = min(waiting, key=lambda r: (by_dataset[groups[r][0]], by_group[groups[r]], r))
        length = int(trace.lengths[request])
        if sum(by_dataset.values()) + length > tokens:
            break
        by_dataset[groups[request][0]] += length
        by_group[groups[request]] += length
        waiting.remove(request)
        chosen.append(request)
    return sorted(chosen)


def make_gpt_oss_20b(source: Path, data: Path, tokens: int, overwrite: bool) -> None:
    whole = import_fingerprint(source / "gpt_oss_20b_decode.npz")
    requests = balanced_requests(whole, tokens)
    trace = select_requests(whole, requests)
    rows = [row | {"index": index} for row, index in zip(trace.meta["requests"], requests, strict=True)]
    meta = trace.meta | {
        "requests": rows,
        "source": "github.com/AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting at 72b368f, data/*/*/*_examples.json",
        "capture": trace.meta["capture"]
        + f"; a subset of {trace.requests} of {whole.requests} sequences (row key index): the first {HEAD_TOKENS} "
        "tokens and more in file order, then balanced over datasets and categories; gates rounded to 1/255",
    }
    _save(dataclasses.replace(trace, meta=meta), data / "gpt-oss-20b.npz", overwrite)
    _copy(source / "LICENSE", data / "LICENSE-gpt-oss-20b", overwrite)


def make_phone_traces(source: Path, data: Path, tests: Path, overwrite: bool) -> None:
    for name, (file, model, change, cache_mib) in PHONE_TRACES.items():
        trace, residency = read_bigmoe(source / f"{name}.route.csv.xz")
        meta = trace.meta | {
            "model": model,
            "source": f"github.com/Helldez/BigMoeOnEdge at 2d4f2b1, docs/bench-data, {name}.route.csv",
            "licence": "Apache-2.0",
            "capture": f"one prompt on a phone, {change}; global LRU cache of {cache_mib} MiB; the last layer ran only "
            "for the last prompt token; expert bytes by layer from the file; its residency column is left out here",
            "cache_mib": cache_mib,
        }
        _save(dataclasses.replace(trace, meta=meta), data / file, overwrite)
        residency_file = tests / f"{name}-residency.npz"
        _refuse(residency_file, overwrite)
        with whole_file(residency_file) as file:
            np.savez_compressed(file, residency=residency)
        print(f"{residency_file}: {residency_file.stat().st_size} bytes")
        _copy(source / f"{name}-curve.csv", tests / f"{name}-curve.csv", overwrite)
    _copy(source / "LICENSE", data / "LICENSE-bigmoe-on-edge", overwrite)


def make_reference_trace(data: Path, overwrite: bool) -> None:
    from experiments.offloading.recorded import record  # runs the model

    _save(record(), data / "specmd-reference.npz", overwrite)


def _save(trace: Trace, path: Path, overwrite: bool) -> None:
    save_trace(trace, path, overwrite)
    held = f"{path.stat().st_size} bytes, {trace.requests} requests, {trace.tokens} tokens"
    print(f"{path}: {held}, sha256 {file_sha256(path)}")


def _copy(source: Path, target: Path, overwrite: bool) -> None:
    _refuse(target, overwrite)
    shutil.copyfile(source, target)


def _refuse(target: Path, overwrite: bool) -> None:
    if target.exists() and not overwrite:
        raise SpecmdError(f"{target}: already exists; --overwrite replaces it")


def main() -> None:
    parser = bare_parser(__doc__, "make_bundled")
    parser.add_argument("gpt_oss_20b", type=Path, metavar="GPT_OSS_20B", help="folder of the gpt-oss-20b sequences")
    parser.add_argument("bigmoe", type=Path, metavar="BIGMOE_ON_EDGE", help="folder of the phone traces")
    parser.add_argument("--data", type=Path, default=Path("specmd_jax/trace/data"), help="where the traces go")
    parser.add_argument("--tests", type=Path, default=Path("tests/data"), help="where the published numbers go")
    parser.add_argument("--tokens", type=int, default=41_500, help="most tokens of gpt-oss-20b (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    args = parser.parse_args()
    for folder in (args.gpt_oss_20b, args.bigmoe):
        if not folder.is_dir():
            raise SpecmdError(f"{folder}: no such folder")
    for folder in (args.data, args.tests):
        folder.mkdir(parents=True, exist_ok=True)
    make_gpt_oss_20b(args.gpt_oss_20b, args.data, args.tokens, args.overwrite)
    make_phone_traces(args.bigmoe, args.data, args.tests, args.overwrite)
    make_reference_trace(args.data, args.overwrite)


if __name__ == "__main__":
    main_guard(main)

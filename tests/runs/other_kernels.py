"""This machine's products as other processors would compute them: settings, and which products each of them changes.

    python tests/runs/other_kernels.py        all settings, one after the other

A library chooses its kernels by the processor and by the shapes. Each setting here makes one choose as on an older
processor. What differs then in the last bits may differ between any two processors; what has to be the same on all of
them (plans, assignments, masks) must not differ.
"""

import hashlib
import json
import math
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np

TESTS = Path(__file__).parents[1]
PATHS = [str(path) for path in (TESTS / "runs", TESTS / "reference", TESTS.parent)]
MKL, ATEN = {"MKL_CBWR": "COMPATIBLE"}, {"ATEN_CPU_CAPABILITY": "default"}
SETTINGS = {
    "MKL": MKL,
    "ATen": ATEN,
    "MKL and ATen": MKL | ATEN,
    "MKL and ATen, 2 threads": MKL | ATEN | {"OMP_NUM_THREADS": "2"},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "MKL and ATen as of AVX2": {"MKL_CBWR": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "MKL as of SSE4.2": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "MKL as of AVX2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "oneDNN": {"ONEDNN_MAX_CPU_ISA": "SSE41"},
    "NumPy": {"OPENBLAS_CORETYPE": "Prescott", "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4 AVX512_ICL AVX512_SPR"},
    "Numba": {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""},
    "libm": {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2,-FMA,-FMA4,-AVX512F"},
}
"""Environment variables, read when the libraries are loaded: so each setting needs a process of its own."""


def environment(setting: str | None = None) -> dict[str, str]:
    """The environment of a process under a setting: one thread by default, and nothing of an outer pytest.

    Waiting threads sleep instead of spinning: other tests run on the same cores.
    """
    changed = {name for variables in SETTINGS.values() for name in variables}
    kept = {name: value for name, value in os.environ.items() if name not in changed and "PYTEST" not in name}
    path = os.pathsep.join([*PATHS, *filter(None, [kept.get("PYTHONPATH")])])
    own = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": path}
    return kept | own | (SETTINGS[setting] if setting else {})


@cache
def digests(kind: str, setting: str | None = None) -> dict[str, str]:
    """Digests of all "products" or "decisions", by name, under a setting, or of this machine as it is."""
    command = [sys.executable, __file__, kind]
    ran = subprocess.run(command, env=environment(setting), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, f"{setting}: {ran.stderr[-2000:]}"
    return json.loads(ran.stdout.splitlines()[-1])


def changed(kind: str, setting: str) -> list[str]:
    """Names of the products, or decisions, that have other bits under a setting."""
    before, after = digests(kind), digests(kind, setting)
    return [name for name in before if before[name] != after[name]]


def digest(array) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()[:16]


def products() -> dict[str, str]:
    """Digests of the products that attention, layers and NumPy use."""
    import torch
    import torch.nn.functional as F

    found = {}
    for dtype in (torch.float32, torch.float64):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape, generator=generator, dtype=dtype):
            return torch.rand(shape, generator=generator, dtype=torch.float64).sub(0.5).to(dtype)

        rows, heads = draw(33, 65), [4 * draw(2, 2, 33, 8) for _ in range(3)]
        triangles, values = draw(4, 16, 16), rows.numpy()
        results = {
            "matmul": draw(37, 48) @ draw(48, 29),
            "large matmul": draw(300, 700) @ draw(700, 300),
            "bmm": draw(5, 17, 24) @ draw(5, 24, 19),
            "linear": F.linear(draw(33, 32), draw(64, 32), draw(64)),
            "attention": F.scaled_dot_product_attention(*heads),
            "triangular solve": torch.linalg.solve_triangular(triangles, draw(4, 16, 8), upper=False),
            "exp": rows.exp(),
            "softmax": rows.softmax(-1),
            "layer norm": F.layer_norm(rows, (65,)),
            "gelu": F.gelu(rows),
            "sum": rows.sum(0),
            "NumPy's matmul": values.T @ values,
            "NumPy's exp": np.exp(values),
            "NumPy's sum": values.sum(0),
        }
        found |= {f"{name} {str(dtype).removeprefix('torch.')}": digest(x) for name, x in results.items()}
    places = np.linspace(0.01, 20, 2001)
    return found | {"Python's exp, log, sin": digest([f(x) for f in (math.exp, math.log, math.sin) for x in places])}


def decisions() -> dict[str, str]:
    """What has to be the same on every machine: plans, an assignment, masks."""
    from histograms import SQUAD, WIKIPEDIA

    from collate.mask_rows import sequence_keys
    from collate.masking import MASKING, MaskingRule
    from packing import PACKERS, assign, plan_packs
    from packing.packers.nnlshp import fit_histogram

    found = {}
    for name, histogram in (("wikipedia", WIKIPEDIA // 100), ("squad", SQUAD)):
        for depth in (3, None):
            found[f"nnlshp's fit of {name} at depth {depth}"] = digest(
                fit_histogram(histogram, len(histogram) - 1, depth)[1]
            )
            for packer in PACKERS:
                plan = plan_packs(histogram, max_sequences_per_pack=depth, packer=packer)
                parts = plan.strategy_lengths, plan.strategy_offsets, plan.repeats
                found[f"{packer}'s plan of {name} at depth {depth}"] = " ".join(map(digest, parts))
        lengths = np.repeat(np.arange(len(histogram)), histogram)
        drawn = assign(plan, lengths, seed=3)
        found[f"assignment of {name}"] = digest(drawn.sequence_indices) + digest(drawn.pack_offsets)
    tokens, offsets = np.arange(30_000) % 50 + 5, np.arange(0, 30_001, 60)
    for masking in MASKING:
        rule = MaskingRule(0.15, masking, 4, np.arange(60) < 5)
        corrupted, labels = rule(tokens, offsets, sequence_keys(0, 0, np.arange(500)))
        found[f"masks, {masking}"] = digest(corrupted) + digest(labels)
    return found


KINDS = {"products": products, "decisions": decisions}


def main() -> None:
    if sys.argv[1:]:
        print(json.dumps(KINDS[sys.argv[1]]()))
        return
    for setting, variables in SETTINGS.items():
        print(f"{setting}:", *(f"{name}={value!r}" for name, value in variables.items()))
        for kind in KINDS:
            print(f"    {kind} that change: {', '.join(changed(kind, setting)) or 'none'}", flush=True)


if __name__ == "__main__":
    main()

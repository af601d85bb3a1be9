"""The numeric tests once more, with the kernels that other processors would choose.

Each setting runs them in a pytest of its own, since libraries read their environment once. A setting that changes no
bit of any product on this machine is skipped, with that reason.
"""

import subprocess
import sys
from pathlib import Path

import pytest
from other_kernels import SETTINGS, changed, digests, environment

TESTS = Path(__file__).parent
EVERY_DAY = "MKL and ATen"

CONTRACT = [
    "bert_pretrain/test_equivalence.py",
    "bert_pretrain/test_slots.py::test_padding_slots_change_nothing",
    "bert_pretrain/attention/test_attention.py::test_every_attention_head_keeps_the_contract",
    "bert_pretrain/attention/test_attention.py::test_packing_changes_nothing_in_any_layout",
    "bert_pretrain/attention/test_attention.py::test_pretrained_weights_run_with_other_attention",
    "bert_pretrain/attention/test_attention.py::test_stock_encoders_take_an_attention_head",
    "bert_pretrain/attention/test_patterns.py::test_contract",
    "bert_pretrain/attention/test_patterns.py::test_contract_with_short_and_long_sequences",
    "bert_pretrain/attention/test_learned.py::test_packed_equals_alone",
    "bert_pretrain/attention/test_learned.py::test_the_rest_of_the_contract",
    "bert_pretrain/attention/test_summaries.py::test_packing_changes_nothing",
    "bert_pretrain/attention/test_summaries.py::test_nystrom_with_a_landmark_for_each_token_is_softmax",
    "bert_pretrain/block/test_blocks_isolate.py::test_packed_is_alone",
    "bert_pretrain/block/test_reversible_models.py",
]
"""What runs every day: the contract of every head and block, and packed = unpacked."""

LONG = {
    "attention": [
        f"bert_pretrain/attention/test_{name}.py"
        for name in ("attention", "patterns", "summaries", "learned", "use", "modes")
    ],
    "blocks": [
        "bert_pretrain/block",
        *(
            f"bert_pretrain/attention/test_{name}.py"
            for name in ("clustered", "hidden", "learned_weights", "persistent")
        ),
        "collate/heads/test_loss_rows.py",
    ],
    "encoders": [
        "bert_pretrain/test_equivalence.py",
        "collate/isolation/test_isolation.py",
        "collate/heads/test_heads.py",
    ],
    "training": [
        "collate/training/test_trainer.py",
        "collate/training/test_stock_trainer.py",
        "bert_pretrain/train/test_optimizer.py",
        "test_evidence.py",
        "bert_pretrain/test_pretrain.py::test_passes_that_are_cut_otherwise_change_what_dropout_draws_and_nothing_else",
    ],
    "packing": [
        "packing/packers",
        "packing/report",
        *(f"packing/test_{name}.py" for name in ("plans", "bounds", "balance")),
    ],
}
OF_PACKING = ("NumPy", "Numba", "libm")
"""Settings of what packing computes with; the others are torch's."""


def run(setting, part, tests):
    """Run tests under a setting; prints what pytest counted, and fails with what failed there."""
    if not changed("products", setting):
        pytest.skip(f"{SETTINGS[setting]} changes no bit of any product on this machine")
    options = ["-p", "no:xdist", "-p", "no:cacheprovider", "-m", "not long", "--durations=0", "--tb=short"]
    command = [sys.executable, "-m", "pytest", *options, *(str(TESTS / test) for test in tests)]
    ran = subprocess.run(
        command, env=environment(setting), cwd=TESTS.parent, capture_output=True, text=True, check=False
    )
    lines = [line for line in ran.stdout.splitlines() if line.strip()]
    assert ran.returncode == 0, "\n".join(lines[-60:]) + ran.stderr[-2000:]
    print(f"\n{setting}, {part}: {lines[-1]}")


def test_the_contract_with_other_kernels():
    run(EVERY_DAY, "contract", CONTRACT)


@pytest.mark.long
@pytest.mark.parametrize(
    ("setting", "part"), [(s, part) for s in SETTINGS for part in LONG if (s in OF_PACKING) == (part == "packing")]
)
def test_numeric_tests_with_other_kernels(setting, part):
    run(setting, part, LONG[part])


@pytest.mark.long
def test_without_a_setting_a_process_computes_the_same_bits_again():
    """Otherwise the changes of a setting would mean nothing."""
    assert digests.__wrapped__("products") == digests("products")


@pytest.mark.long
@pytest.mark.parametrize("setting", SETTINGS)
def test_plans_assignments_and_masks_are_the_same_on_every_processor(setting):
    assert changed("decisions", setting) == []

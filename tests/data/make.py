"""Make what tests/data keeps, with the code that is on the path; see README.md."""

import json
import os
import random
import shutil
import sys
from pathlib import Path

from bert_pretrain.cli import main as bert_pretrain
from packing.cli import main as pack_dataset

NOUNS = [
    "baker",
    "ferry",
    "orchard",
    "lantern",
    "violin",
    "harbour",
    "glacier",
    "tailor",
    "beetle",
    "railway",
    "kettle",
    "meadow",
]
VERBS = ["paints", "follows", "mends", "forgets", "carries", "measures", "borrows", "hears"]
ADJECTIVES = ["quiet", "green", "narrow", "patient", "broken", "early", "distant", "warm"]
RUN = "--sequences_per_step 8 --max_steps 4 --save_steps 2 --logging_steps 1 --learning_rate 0.01 --use_cpu True"
SHAPE = "--hidden_size 16 --num_hidden_layers 1 --num_attention_heads 2 --intermediate_size 32 --adam_epsilon 0.001"
SHAPE += " --hidden_dropout_prob 0 --attention_probs_dropout_prob 0"
QUIETLY = "--report_to none --disable_tqdm True"


def sentence(draw: random.Random) -> str:
    """ "The quiet baker mends a lantern." """
    words = ["the", draw.choice(ADJECTIVES), draw.choice(NOUNS), draw.choice(VERBS), "a", draw.choice(NOUNS)]
    for _ in range(draw.randint(0, 2)):
        words += ["and", draw.choice(VERBS), "the", draw.choice(ADJECTIVES), draw.choice(NOUNS)]
    return " ".join(words).capitalize() + "."


def text(draw: random.Random, paragraphs: int) -> str:
    return "\n\n".join(" ".join(sentence(draw) for _ in range(draw.randint(1, 5))) for _ in range(paragraphs)) + "\n"


def rows(draw: random.Random, count: int) -> str:
    """JSON lines: a sequence of up to 40 tokens, of which every tenth is too long for packs of 32, and a label."""
    made = []
    for number in range(count):
        length = draw.randint(33, 40) if number % 10 == 9 else draw.randint(3, 32)
        tokens = [2, *(draw.randint(5, 99) for _ in range(length - 2)), 3]
        made.append({"input_ids": tokens, "label": draw.choice(["no", "yes"]), "score": draw.randint(0, 64) / 64})
    return "".join(json.dumps(row) + "\n" for row in made)


def pack_until(renames: int, *arguments: str) -> None:
    """Pack in small shards in a child, which dies at a rename: what it finished stays in .TARGET.partial."""
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    import packing.dataset

    packing.store.contents.SHARD_BYTES = 4000
    packing.store.contents.BATCH_TOKENS = 256
    rename, left = os.rename, [renames]

    def dies(*paths) -> None:
        left[0] -= 1
        if not left[0]:
            os._exit(1)
        rename(*paths)

    os.rename = dies  # type: ignore[assignment]
    pack_dataset(list(arguments))
    os._exit(1)


def main() -> None:
    draw = random.Random(0)
    Path("rows").mkdir()
    Path("rows/train.jsonl").write_text(rows(draw, 120))
    Path("rows/test.jsonl").write_text(rows(draw, 30))
    Path("text.txt").write_text(text(draw, 60))
    length = ["--max-sequence-length", "32"]
    pack_dataset(["rows", "arrow", *length, "--overlong", "split"])
    pack_dataset(["rows", "parquet", *length, "--overlong", "truncate", "--format", "parquet"])
    pack_until(9, "rows", "half", *length, "--overlong", "split")
    Path(".half.partial.lock").unlink()  # names the process and the machine
    prepare = "prepare --text text.txt --output prepared --max_sequence_length 32 --vocab_size 90 --test_fraction 0.2"
    bert_pretrain(prepare.split())
    pack_dataset(["prepared", "pairs", *length])
    data = ["--dataset", "pairs", "--tokenizer", "prepared/tokenizer", "--output_dir", "run"]
    bert_pretrain(["train", *data, *f"{RUN} {SHAPE} {QUIETLY}".split()])
    Path("whole").mkdir()
    for name in ("model.safetensors", "trainer_state.json"):
        Path("run", name).rename(Path("whole", name))
    shutil.rmtree("run/checkpoint-4")
    for path in Path("run").iterdir():
        if path.is_file():
            path.unlink()


if __name__ == "__main__":
    os.chdir(sys.argv[1])
    main()

"""GPT2BPETokenizer from its two files, with no network."""

from tokenizers import ByteLevelBPETokenizer

from tests.programs import ask

TEXT = "def cut(sequence, splits):\n    return [sequence[i::splits] for i in range(splits)]\n"

_PROGRAM = """
import json, sys
from megatron.adaptor import install
install()
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.arguments import parse_args
vocab, merges, text = json.loads(sys.stdin.read())
files = ["--vocab-file", vocab, "--merge-file", merges]
sys.argv = ["x", "--tokenizer-type", "GPT2BPETokenizer", *files]
args = parse_args()
tokenizer = build_tokenizer(args)
print("ANSWER" + json.dumps([tokenizer.vocab_size, tokenizer.eod, tokenizer.tokenize(text)]))
"""


def test_ids_are_those_of_the_files(tmp_path):
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator([TEXT] * 3, vocab_size=300, special_tokens=["<|endoftext|>"])
    bpe.save_model(str(tmp_path))
    files = [str(tmp_path / name) for name in ("vocab.json", "merges.txt")]
    size, eod, ids = ask(_PROGRAM, [*files, TEXT], HF_HUB_OFFLINE="1")
    assert size == bpe.get_vocab_size()
    assert eod == bpe.token_to_id("<|endoftext|>")
    assert ids == bpe.encode(TEXT).ids

"""A tiny random model of Qwen2's architecture, whose vocabulary is padded as Qwen's is."""

import os

# Two tests run at once on two cores: threads that wait for each other would take the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch
import torch.distributed as dist
import warm
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

CHARACTERS = "0123456789abcdefghijklmnopqrstuvwxyz +-*/=\\{}.?,:;"


def pytest_configure(config):
    """With workers (-n), all share one server of warm.py."""
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        warm.start_server()


def save_tiny_model(folder, *, tied=False, context=512, kv_heads=2) -> str:
    """Write model and tokenizer to `folder`: 96 embeddings, fewer tokens, heads of 32."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=kv_heads,
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    model = Qwen2ForCausalLM(config)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # a fresh model's are all 0
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


def save_tokenizer(folder) -> None:
    """One token a character."""
    # The last one is a token that transformers adds for this type of model, if it is not there.
    words = ["<pad>", "<bos>", "<eos>", *CHARACTERS, "<|endoftext|>"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    ).save_pretrained(folder)


@pytest.fixture(scope="session")
def tiny_model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tied_model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("tied"), tied=True)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """This process as a process group of one."""
    store = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    os.environ["RANK"] = "0"
    yield
    dist.destroy_process_group()
    del os.environ["RANK"]

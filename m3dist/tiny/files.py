"""The tiny checkpoint's files other than weights: config.json, the tokenizer and generation_config.json."""

import itertools
import json
import shutil
from pathlib import Path

from m3dist.tiny import PATH
from m3dist.tiny.dialogues import train_dialogues

VOCABULARY = 1024
PAD, TURN, END, BEGIN = "]!p~[", "]~b]", "[e~[", "]~!b["
SPECIAL = [PAD, TURN, END, BEGIN]
VISIBLE = ["<mm:think>", "</mm:think>", "]<]minimax[>["]
TEMPLATE = "chat_template.jinja"

LAYERS = [0, 1, 1]  # one dense layer with full attention, then mixture-of-experts layers with sparse attention


def text_config() -> dict:
    """The text model's configuration, in the published spelling; every width divides by eight machines."""
    return {
        "architectures": ["MiniMaxM3SparseForCausalLM"],
        "hidden_size": 128,
        "num_hidden_layers": len(LAYERS),
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "intermediate_size": 256,
        "dense_intermediate_size": 512,
        "shared_intermediate_size": 256,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "use_gemma_norm": True,
        "use_qk_norm": True,
        "qk_norm_type": "per_head",
        "attention_output_gate": False,
        "rope_theta": 10000,
        "rotary_dim": 16,
        "partial_rotary_factor": 0.5,
        "hidden_act": "swigluoai",
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "tie_word_embeddings": False,
        "num_local_experts": 16,
        "num_experts_per_tok": 4,
        "n_shared_experts": 1,
        "scoring_func": "sigmoid",
        "use_routing_bias": True,
        "routed_scaling_factor": 2.0,
        "moe_layer_freq": LAYERS,
        "bos_token_id": SPECIAL.index(BEGIN),
        "eos_token_id": SPECIAL.index(END),
        "pad_token_id": SPECIAL.index(PAD),
        "sparse_attention_config": {
            "use_sparse_attention": True,
            "sparse_attention_freq": LAYERS,
            "sparse_num_index_heads": 4,
            "sparse_index_dim": 32,
            "sparse_block_size": 16,
            "sparse_topk_blocks": 8,
            "sparse_local_block": 1,
            "sparse_init_block": 0,
            "sparse_score_type": "max",
            "sparse_disable_index_value": LAYERS,
        },
    }


def ids() -> dict:
    """The token ids that config.json and generation_config.json both name."""
    return {f"{name}_token_id": text_config()[f"{name}_token_id"] for name in ("bos", "eos", "pad")}


def corpus(dialogues: int = 20000):
    """The generator's texts, for the tokenizer to learn from."""
    for talk in itertools.islice(train_dialogues(seed=0), dialogues):
        yield from (message["content"] for message in talk.messages)
        yield from (message.get("reasoning_content", "") for message in talk.messages)
        if talk.tools:
            yield from ("<tool>" + json.dumps(entry["function"]) + "</tool>" for entry in talk.tools)
            yield '# Tools\n<tools>\n</tools><tool_call>\n<invoke name="></invoke>\n</tool_call><city></city>'
        yield "developer\nuser\nai\ntool\n<response></response>"


def build_tokenizer():
    """Byte-level BPE with single digits and M3's markers (`tokenizers.Tokenizer`)."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # The visible markers join later as ordinary added tokens: ids after the vocabulary's last.
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(VISIBLE),
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens([AddedToken(marker, special=False, normalized=False) for marker in VISIBLE])
    if tokenizer.get_vocab_size() > VOCABULARY:
        raise ValueError(f"{tokenizer.get_vocab_size()} tokens do not fit the vocabulary of {VOCABULARY}")
    return tokenizer


def write_json(path: Path, content: dict) -> None:
    """Write a readable JSON file."""
    path.write_text(json.dumps(content, indent=2) + "\n")


def write_files(out: Path) -> None:
    """Write everything but the weights."""
    out.mkdir(parents=True, exist_ok=True)
    build_tokenizer().save(str(out / "tokenizer.json"))
    if out.resolve() != PATH.resolve():
        shutil.copy(PATH / TEMPLATE, out / TEMPLATE)
    config = {
        "architectures": ["MiniMaxM3SparseForConditionalGeneration"],
        "model_type": "minimax_m3_vl",
        "torch_dtype": "bfloat16",
        "text_config": text_config(),
    }
    write_json(out / "config.json", config | ids())
    write_json(out / "generation_config.json", ids() | {"do_sample": False})
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "additional_special_tokens": [TURN],
        "clean_up_tokenization_spaces": False,
        "model_max_length": text_config()["max_position_embeddings"],
    }
    write_json(out / "tokenizer_config.json", tokenizer_config)

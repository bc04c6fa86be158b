"""Write a base of a given size with random weights: how fast a model trains does not go by what it knows.

    python benchmarks/sft_gpu/random_base.py OUT --tokenizer FOLDER

The sizes are those of SmolLM2-1.7B (https://huggingface.co/HuggingFaceTB/SmolLM2-1.7B-Instruct, config.json).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import transformers

SMOLLM2_1_7B = {
    "vocab_size": 49_152, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
    "num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 8192,
    "rope_parameters": {"rope_type": "default", "rope_theta": 130_000.0}, "rms_norm_eps": 1e-5,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip


def main() -> None:
    """Write the folder."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokenizer", required=True, help="folder that holds one with its chat template")
    options = parser.parse_args()
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.LlamaForCausalLM._from_config(
            transformers.LlamaConfig(**SMOLLM2_1_7B), dtype=torch.bfloat16
        )
    model.save_pretrained(options.out)
    transformers.AutoTokenizer.from_pretrained(options.tokenizer).save_pretrained(options.out)
    print(f"written: {options.out}, {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()

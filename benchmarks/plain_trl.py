"""A recipe and questions with answers enter; the usual TRL + PEFT script for the same job leaves.

TRL's own preparation, masking, loss and loop; nothing of lorakit but the recipe's numbers.
"""

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def plain_trl(base, pairs, recipe, folder):
    """SFTTrainer for `pairs` of (question, answer), made from `recipe`, on this CPU."""
    set_seed(recipe.seed)
    adapter = LoraConfig(
        r=recipe.lora_r,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=TARGETS,
        task_type="CAUSAL_LM",
    )
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    rows = [
        {
            "prompt": [{"role": "user", "content": question}],
            "completion": [{"role": "assistant", "content": answer}],
        }
        for question, answer in pairs
    ]
    arguments = SFTConfig(
        output_dir=folder,
        per_device_train_batch_size=recipe.micro_batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        learning_rate=recipe.learning_rate,
        max_steps=recipe.max_steps,
        lr_scheduler_type=recipe.lr_scheduler,
        warmup_steps=round(recipe.warmup_ratio * recipe.max_steps),
        max_length=recipe.cutoff_len,
        bf16=True,
        use_cpu=True,
        gradient_checkpointing=False,
        seed=recipe.seed,
        data_seed=recipe.seed,
        save_strategy="no",
        logging_steps=1,
        report_to=[],
        disable_tqdm=True,
    )
    return SFTTrainer(
        model=get_peft_model(model, adapter),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(base),
    )

"""Distil a student from Python: files or rows in, a transformers model out."""

from __future__ import annotations

from typing import Any

from deltakd import distill


def main(**models_and_data: Any) -> None:
    run = distill(
        **models_and_data,  # student=..., teacher=..., teacher_raw=..., data=...
        loss="delta_kd",
        lr=1e-3,
        max_steps=20,
        overrides={"evaluation": "none", "logger": "csv"},
    )
    print(run.scores["train/loss"], run.directory)

    prompt = run.tokenizer("Name three colours.", return_tensors="pt")
    answer = run.student.generate(**prompt, max_new_tokens=8, do_sample=False)
    print(run.tokenizer.decode(answer[0]))


if __name__ == "__main__":
    main(
        student="openai-community/gpt2",
        teacher="MiniLLM/teacher-gpt2-1.5B",
        teacher_raw="openai-community/gpt2-xl",
        data=[
            {"instruction": "Name three colours.", "response": "Red, green and blue."},
            {"instruction": "Name a planet.", "response": "Venus."},
        ],
    )

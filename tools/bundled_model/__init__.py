"""Make the bundled model: facts, text, tokenizer, training, measurement, sample edits."""

"""What a Llama is, apart from any training: architecture, files, tokenizer, prompt formats."""

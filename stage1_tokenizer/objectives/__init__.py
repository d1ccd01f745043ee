"""What a tokenizer is trained for: one file per objective, found by the registry ``OBJECTIVES``."""

"""The paper's figures and tables in miniature, and what we tried beyond the paper."""

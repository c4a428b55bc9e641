"""The paper's tables, counted here."""

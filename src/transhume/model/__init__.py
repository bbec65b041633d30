"""The nouns that every room shares. No logic lives here."""

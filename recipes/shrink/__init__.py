"""Recipes that `plmcc shrink` chooses from; `shrink:` says what each is for."""

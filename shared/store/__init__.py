"""The artifact store and the typed artifacts in it."""

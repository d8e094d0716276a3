"""Rules of averaging the global model, one file each; ``server.wrapped`` puts one around any."""

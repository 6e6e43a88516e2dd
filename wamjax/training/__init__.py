"""The framework: it trains whatever has a loss, on any mesh, and stops and goes on at any step."""

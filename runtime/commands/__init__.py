"""The commands that run, measure and explain bundles, above the library: flags to its calls, results to the terminal."""

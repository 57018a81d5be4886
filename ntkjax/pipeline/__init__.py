"""The steps that commands share: options, config files, run directories, loading, deduplication, warm-up."""

"""Actions on a trained run: acting, sampling, reconstruction and evaluation."""

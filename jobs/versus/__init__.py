"""Model A against B: what two outputs of one data set say of the same records and targets."""

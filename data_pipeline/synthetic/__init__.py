"""A data set of drawn scenes, laid out like CUHK-SYSU."""

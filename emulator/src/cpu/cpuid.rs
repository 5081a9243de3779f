//! The CPU we offer: one model, one table.

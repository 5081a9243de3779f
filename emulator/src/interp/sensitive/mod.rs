//! Every sensitive instruction (Popek and Goldberg 1974), and nothing else.

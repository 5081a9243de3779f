//! What several tests of lockstep need.

pub mod planted;
pub mod small;

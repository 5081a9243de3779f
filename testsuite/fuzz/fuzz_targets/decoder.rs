//! The decoder wrapper: any bytes in three modes.
#![no_main]

use bivisor_testsuite::fuzz::{Guided, guided};
use std::cell::RefCell;

thread_local! {
    static TARGET: RefCell<Box<dyn Guided>> = RefCell::new(guided("decoder").expect("the target"));
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| TARGET.with_borrow_mut(|t| t.bytes(input)).expect("a finding"));

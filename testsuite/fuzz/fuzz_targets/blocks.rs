//! Block translation: interpreter against translator on any bytes at CPL 3.
#![no_main]

use bivisor_testsuite::fuzz::{Guided, guided};
use std::cell::RefCell;

thread_local! {
    static TARGET: RefCell<Box<dyn Guided>> = RefCell::new(guided("blocks").expect("the target"));
}

libfuzzer_sys::fuzz_target!(|input: &[u8]| TARGET.with_borrow_mut(|t| t.bytes(input)).expect("a finding"));

//! The probe of the host's KVM: quick, consistent, with evidence.

use bivisor_kvm_backend::{Kind, host};
use std::time::Instant;

#[test]
fn the_probe_is_quick_and_consistent() {
    let start = Instant::now();
    let h = host();
    let took = start.elapsed();
    println!("{h:#?}\ntook {took:?}");
    assert!(!h.evidence.is_empty() && !h.reason.is_empty());
    match h.kind {
        Kind::Absent | Kind::Forbidden | Kind::Broken => {
            assert!(!h.usable_for_process && !h.usable_for_machine && !h.pays_off)
        }
        Kind::Software => assert!(!h.usable_for_machine && !h.pays_off),
        Kind::VtX | Kind::Svm => assert!(h.usable_for_machine && h.pays_off && !h.syscall_stays_at_cpl3),
    }
    let again = Instant::now();
    host();
    assert!(again.elapsed().as_micros() < 1000, "the second call is cached");
}

//! KVM beside the interpreter on sequences of a kernel (`diff --all --kinds cpl0`): drawn ones where KVM is hardware, and everywhere those that
//! a software KVM, which interprets kernels, runs too.

use bivisor_testsuite::campaign::engine::Which;
use bivisor_testsuite::campaign::group::{Group, Verdict, kvm_for_kernels};
use bivisor_testsuite::campaign::sequence::{Sequence, known, registers, text};
use bivisor_testsuite::random::Random;

/// Interpreter, translator and KVM; `None`, which is said: there is no KVM at all.
fn group() -> Option<Group> {
    match Group::of(&[Which::InterpPaged, Which::BtPaged, Which::Kvm]) {
        Ok(group) => Some(group),
        Err(why) => {
            println!("SKIPPED: {why}");
            None
        }
    }
}

fn sequence(code: &[u8], interrupt: Option<(usize, u8)>) -> Sequence {
    let gpr = registers(&mut Random::new(1));
    Sequence { kernel: true, code: code.into(), gpr, rflags: 0x202, seed: 1, budgets: vec![1, 1, 2000], interrupt }
}

fn kvms(verdicts: Vec<Verdict>) -> Option<Option<String>> {
    verdicts.into_iter().find(|v| v.0 == Which::Kvm).map(|v| v.1)
}

/// Nothing that hardware does may differ.
#[test]
fn hardware() {
    if let Err(why) = kvm_for_kernels() {
        return println!("SKIPPED: kernels on KVM: {why}");
    }
    let Some(mut group) = group() else { return };
    let mut r = Random::new(1);
    let mut compared = 0;
    for _ in 0..400 {
        let s = group.source().draw(&mut r, true);
        for (which, what) in group.run(&s) {
            compared += u32::from(which == Which::Kvm);
            if let Some(what) = what.filter(|what| known(&s, what).is_none()) {
                panic!("{}: {what}\n{}\n{s:x?}", which.name(), text(&s));
            }
        }
    }
    assert!(compared > 100, "KVM had only {compared} of them");
}

/// What it is, code, an interrupt that waits.
type Row = (&'static str, &'static [u8], Option<(usize, u8)>);

/// Instructions, an exception and an interrupt through the IDT, page-table edits, control registers: what a software KVM interprets rightly.
#[test]
fn what_every_kvm_runs() {
    let Some(mut group) = group() else { return };
    #[rustfmt::skip]
    let rows: [Row; 6] = [
        // mov rax, 5; add rax, rbx; push rax; pushfq; pop rdx; imul rax, rdx; xchg [rsp], rax
        ("registers and the stack", &[0x48, 0xc7, 0xc0, 5, 0, 0, 0, 0x48, 0x01, 0xd8, 0x50, 0x9c, 0x5a, 0x48, 0x0f, 0xaf, 0xc2,
            0x48, 0x87, 0x04, 0x24], None),
        ("an exception, RIP behind its first byte", &[0x0f, 0x0b, 0x90, 0xcc, 0x90], None),
        ("INT n", &[0xcd, 0x80, 0x90], None),
        ("an interrupt that waits", &[0xfa, 0x90, 0xfb, 0x90, 0x90, 0xf4], Some((1, 0x30))),
        // mov rax, cr0; mov rdx, cr3; mov cr3, rdx; mov rbx, cr4
        ("control registers", &[0x0f, 0x20, 0xc0, 0x0f, 0x20, 0xda, 0x0f, 0x22, 0xda, 0x0f, 0x20, 0xe3], None),
        // mov ecx, 0xc0000082; mov eax, 0x1234; xor edx, edx; wrmsr; rdmsr: with the address as the generator loads it
        ("MSRs", &[0xb8, 0x34, 0x12, 0, 0, 0x31, 0xd2, 0x48, 0xb9, 0x82, 0, 0, 0xc0, 0, 0, 0, 0, 0x0f, 0x30,
            0x48, 0xb9, 0x82, 0, 0, 0xc0, 0, 0, 0, 0, 0x0f, 0x32], None),
    ];
    for (what, code, interrupt) in rows {
        let s = sequence(code, interrupt);
        assert!(s.is_for_hardware(), "{what}");
        assert_eq!(kvms(group.run(&s)), Some(None), "{what}: {}", text(&s));
    }
}

/// Who compares must see a difference: random numbers are no engine's business to repeat.
#[test]
fn a_difference_is_seen() {
    let Some(mut group) = group() else { return };
    let s = sequence(&[0x48, 0x0f, 0xc7, 0xf0], None);
    let what = kvms(group.run(&s)).expect("it is for KVM").expect("RDRAND gives another number each time");
    assert!(what.contains("rax"), "{what}");
    let longer = sequence(&[0x90, 0x53, 0x48, 0x0f, 0xc7, 0xf0, 0x5a], None);
    let (small, _) = group.shrink(Which::Kvm, longer, what);
    assert_eq!(small.code, [0x48, 0x0f, 0xc7, 0xf0]);
}

/// What hardware cannot be asked for.
#[test]
fn what_is_not_for_hardware() {
    let rows: [&[u8]; 5] =
        [&[0x0f, 0x31], &[0x0f, 0x01, 0xc1], &[0x0f, 0x32], &[0x0f, 0x30], &[0x90, 0x0f, 0x01, 0xf9]];
    for code in rows {
        assert!(!sequence(code, None).is_for_hardware(), "{code:02x?}");
    }
    assert!(!Sequence { kernel: false, ..sequence(&[0x90], None) }.is_for_hardware());
}

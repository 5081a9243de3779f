//! The facts table against iced's op-code information, the manual's lists, the offered CPU, and the dispatch table.

use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::isa::facts::{Form, is_undefined, row_of, rows};
use bivisor_emulator::isa::{Class, Facts, Privilege, Sensitivity, facts};
use bivisor_testsuite::dispatch::{self, module_of};
use iced_x86::{Code, Mnemonic as M};
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

fn report(wrong: Vec<String>) {
    assert!(wrong.is_empty(), "{} wrong\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn what_iced_flags_has_a_row() {
    let mut wrong = Vec::new();
    for code in Code::values() {
        let op = code.op_code();
        let flagged = op.is_privileged()
            || op.must_be_cpl0()
            || op.may_require_cpl0()
            || op.is_input_output()
            || op.intel_vm_exit()
            || op.intel_may_vm_exit()
            || op.amd_vm_exit()
            || op.amd_may_vm_exit();
        if flagged && row_of(code).is_none() && !is_undefined(code) {
            wrong.push(format!("{code:?} has no row"));
        }
    }
    report(wrong);
}

#[test]
fn privilege_agrees_with_iced() {
    let mut wrong = Vec::new();
    for code in Code::values() {
        let Facts { class, privilege, .. } = *facts(code);
        if class == Class::Undefined {
            // #UD comes before any privilege check.
            if privilege != Privilege::Anyone {
                wrong.push(format!("{code:?} is undefined, but asks for {privilege:?}"));
            }
            continue;
        }
        let op = code.op_code();
        let right = match privilege {
            Privilege::Cpl0 => op.must_be_cpl0(),
            // MONITOR and MWAIT: AMD can allow them to users (APM 3, HWCR.MonMwaitUserEn).
            Privilege::Cpl0OrUd => op.must_be_cpl0() || matches!(code.mnemonic(), M::Monitor | M::Mwait),
            Privilege::Iopl => op.is_privileged() && !op.must_be_cpl0(),
            Privilege::Cr4Umip | Privilege::Cr4Tsd | Privilege::Cr4Pce => op.may_require_cpl0(),
            // CPUID faulting is not offered.
            Privilege::Anyone => {
                !op.is_privileged() && !op.must_be_cpl0() && (!op.may_require_cpl0() || code == Code::Cpuid)
            }
        };
        if !right {
            wrong.push(format!("{code:?}: {privilege:?}"));
        }
    }
    report(wrong);
}

#[test]
fn every_row_is_reached() {
    let used: BTreeSet<*const _> = Code::values().filter_map(row_of).map(std::ptr::from_ref).collect();
    let unused = rows().iter().filter(|r| !used.contains(&std::ptr::from_ref(*r)));
    report(unused.map(|r| format!("{:?} {:?} decides about nothing", r.mnemonic, r.form)).collect());
}

#[test]
fn no_row_is_given_twice() {
    let mut seen = BTreeSet::new();
    let twice = rows().iter().filter(|r| !seen.insert((format!("{:?}", r.mnemonic), format!("{:?}", r.form))));
    report(twice.map(|r| format!("{:?} {:?}", r.mnemonic, r.form)).collect());
}

/// Robin and Irvine 2000, table of the Pentium's sensitive, unprivileged instructions: 18 as printed.
#[test]
fn robin_and_irvine() {
    use Form::{Any, Far, Sreg};
    #[rustfmt::skip]
    let list = [
        (M::Sgdt, Any), (M::Sidt, Any), (M::Sldt, Any), (M::Smsw, Any), (M::Str, Any), (M::Pushfq, Any), (M::Popfq, Any),
        (M::Lar, Any), (M::Lsl, Any), (M::Verr, Any), (M::Verw, Any), (M::Pop, Sreg), (M::Push, Sreg), (M::Mov, Sreg),
        (M::Call, Far), (M::Jmp, Far), (M::Retf, Any), (M::Int, Any),
    ];
    for (mnemonic, form) in list {
        let row = rows().iter().find(|r| r.mnemonic == mnemonic && r.form == form).expect("a row");
        assert_ne!(row.facts.sensitivity, Sensitivity::Innocuous, "{mnemonic:?}");
        assert!(matches!(row.facts.privilege, Privilege::Anyone | Privilege::Cr4Umip), "{mnemonic:?}");
    }
}

#[test]
fn what_is_undefined_is_not_offered() {
    let max = CpuModel::max();
    let offered = Code::values().filter(|c| facts(*c).class == Class::Undefined && max.supports(*c));
    // UD0, UD1, UD2 exist in order to be undefined, and CET's other instructions are so by their rows.
    let offered = offered.filter(|c| row_of(*c).is_none());
    report(offered.map(|c| format!("{c:?}")).collect());
}

fn sensitive_modules() -> BTreeSet<String> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../emulator/src/interp/sensitive");
    let files = std::fs::read_dir(dir).expect("the directory").map(|e| e.expect("an entry").path());
    files.filter_map(|f| Some(f.file_stem()?.to_str()?.to_string())).collect()
}

#[test]
fn sensitive_instructions_and_no_others_are_in_the_sensitive_modules() {
    let sensitive = sensitive_modules();
    let mut wrong = BTreeSet::new();
    for code in Code::values().filter(|c| facts(*c).class != Class::Undefined) {
        let module = module_of(code);
        let is = facts(code).sensitivity != Sensitivity::Innocuous;
        if module != "undefined" && sensitive.contains(module) != is {
            let sensitivity = facts(code).sensitivity;
            wrong.insert(format!("{:?} ({code:?}) is {sensitivity:?} and goes to {module}", code.mnemonic()));
        }
    }
    report(wrong.into_iter().collect());
}

#[test]
fn what_a_cpu_can_have_has_a_function() {
    let native = dispatch::rows().iter().any(|r| r.class == Some("Native"));
    if !native {
        println!("SKIPPED: there is no row for Class::Native yet");
    }
    let mut wrong = BTreeMap::new();
    for code in Code::values() {
        let class = facts(code).class;
        let expected = class != Class::Undefined && (native || class != Class::Native);
        if expected && module_of(code) == "undefined" {
            wrong.insert(format!("{:?}", code.mnemonic()), format!("{code:?} is {class:?} and has no function"));
        }
    }
    report(wrong.into_values().collect());
}

/// What `bivisor explain` names as the place is there.
#[test]
fn every_function_named_is_in_the_file_named() {
    let root = dispatch::root();
    let mut files: BTreeMap<String, String> = BTreeMap::new();
    let mut wrong = BTreeSet::new();
    for code in Code::values() {
        let (file, function) = dispatch::place(code);
        let text = files
            .entry(file.clone())
            .or_insert_with(|| std::fs::read_to_string(root.join(&file)).unwrap_or_else(|e| panic!("{file}: {e}")));
        let name = function.trim_start_matches("r#");
        let defined = [
            format!("fn {name}("),
            format!("fn {name}<"),
            format!("fn r#{name}("),
            format!("{name} =>"),
            format!("{name},"),
            format!("{name}:"),
        ];
        if !defined.iter().any(|d| text.contains(d.as_str())) {
            wrong.insert(format!("{file} has no {function} for {code:?}"));
        }
    }
    report(wrong.into_iter().collect());
}

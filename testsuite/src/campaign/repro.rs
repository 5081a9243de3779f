//! A case as a request of `bivisor exec`: what is needed to see a divergence again, without the campaign.

use super::arena::{self, PAGES};
use super::case::Case;
use super::modes::engine::ORDER;
use super::modes::segments::{LDT, segment};
use super::outcome::Outcome;
use crate::lockstep::repro::{bytes, hex, rights, wide};
use bivisor_emulator::cpu::{CpuState, Efer, Segment};
use bivisor_emulator::interp::sensitive::selector::linux_descriptor;
use bivisor_emulator::isa::Seg;
use bivisor_emulator::mem::{PAGE_SIZE, Prot};
use serde_json::{Value, json};

/// Instructions after which a block hangs.
const BLOCK: u64 = 1000;

/// The request: the pages that the case can touch with their rights, its code and its data. `system`: of 16- and 32-bit
/// code the system registers; the descriptor tables come with them.
pub fn request(case: &Case, pristine: &[u8], system: Option<&CpuState>) -> Value {
    let names = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"];
    let mut regs = serde_json::Map::new();
    for (i, v) in case.gpr.iter().enumerate() {
        let name = names.get(i).map_or(format!("r{i}"), ToString::to_string);
        regs.insert(name, hex(*v).into());
    }
    regs.insert("rip".into(), hex(case.rip).into());
    regs.insert("rflags".into(), hex(case.rflags).into());
    let bits = case.kind.bits();
    let code = case.linear();
    let windows = case.windows.iter().map(|w| (w.0, u64::from(w.1)));
    let touched: Vec<_> = windows.chain([(code, case.code.len() as u64 + 1)]).collect();
    let near = |page: u64| touched.iter().any(|&(at, len)| page <= at + len && at < page + PAGE_SIZE);
    let own = (arena::OWN, 0x1000, Prot::all());
    let pages = PAGES.iter().copied().chain((bits != 64).then_some(own)).flat_map(|(start, len, prot)| {
        (start..start + len)
            .step_by(PAGE_SIZE as usize)
            .filter(|p| near(*p) || *p == arena::OWN)
            .map(move |p| (p, prot))
    });
    // Behind 16- and 32-bit code stands INT3, the end.
    let fill = |prot: Prot| if bits != 64 && prot.contains(Prot::EXEC) { "cc" } else { "00" };
    let mut mem: Vec<Value> = pages
        .map(|(p, prot)| json!({ "addr": hex(p), "fill": fill(prot), "len": PAGE_SIZE, "rights": rights(prot) }))
        .collect();
    mem.push(json!({ "addr": hex(code), "hex": bytes(&case.code) }));
    for &(addr, len) in &case.windows {
        let at = (addr - super::arena::BASE) as usize;
        let mut content = pristine[at..at + usize::from(len)].to_vec();
        for (to, put) in &case.puts {
            for (n, b) in put.iter().enumerate() {
                let at = (to + n as u64).wrapping_sub(addr);
                if at < u64::from(len) {
                    content[at as usize] = *b;
                }
            }
        }
        mem.push(json!({ "addr": hex(addr), "hex": bytes(&content) }));
    }
    let stop = match (case.kind.is_single(), bits) {
        (true, _) => json!({ "insns": 1 }),
        (false, 64) => json!({ "insns": BLOCK, "rip": hex(code + case.code.len() as u64) }),
        (false, _) => json!({ "insns": BLOCK }),
    };
    let long = system.is_none_or(|s| s.efer.contains(Efer::LMA));
    let mode = match bits {
        64 => "long64",
        32 => {
            if long {
                "compat32"
            } else {
                "prot32"
            }
        }
        _ => {
            if long {
                "compat16"
            } else {
                "prot16"
            }
        }
    };
    let mut request = json!({
        "id": "repro", "mode": mode, "cpl": 3, "regs": regs, "stop": stop,
        "segs": { "fs": { "sel": "0x0", "base": hex(case.fs_base), "limit": "0xffffffff", "attr": "0xc0f3" } },
        "want": ["regs", "memdelta"],
    });
    if let Some(system) = system {
        segments(case, system, &mut request, &mut mem);
    }
    request["mem"] = mem.into();
    let x = &case.xsave;
    if x.xstate_bv() != 0 {
        request["fpu"] = json!({
            "fcw": hex(x.fcw().into()), "fsw": hex(x.fsw().into()), "ftw_abridged": hex(x.ftw_abridged().into()),
            "st": (0..8).map(|i| wide(&x.st(i))).collect::<Vec<_>>(), "mxcsr": hex(x.mxcsr().into()),
        });
        let mut vec = serde_json::Map::new();
        for i in 0..32 {
            vec.insert(format!("zmm{i}"), wide(&x.zmm(i)).into());
        }
        for i in 0..8 {
            vec.insert(format!("k{i}"), hex(x.opmask(i)).into());
        }
        request["vec"] = vec.into();
        let wanted = ["regs", "fpu", "vec", "memdelta"].into_iter().chain((bits != 64).then_some("segs"));
        request["want"] = wanted.collect::<Vec<_>>().into();
    }
    request
}

/// The segment registers, and the tables that selectors are looked up in.
fn segments(case: &Case, system: &CpuState, request: &mut Value, mem: &mut Vec<Value>) {
    let value = |s: &Segment| {
        json!({ "sel": hex(s.selector.into()), "base": hex(s.base), "limit": hex(s.limit.into()),
            "attr": hex(s.attr.bits().into()) })
    };
    let mut segs = serde_json::Map::new();
    for (reg, selector) in ORDER.into_iter().zip(case.selectors) {
        let held = segment(selector).unwrap_or(Segment::unusable(selector));
        segs.insert(Seg::NAMES[reg as usize].into(), value(&held));
    }
    segs.insert("gs".into(), value(&Segment::unusable(0)));
    request["segs"] = segs.into();
    request["sys"] = json!({
        "gdtr": { "base": hex(system.gdtr.base), "limit": system.gdtr.limit },
        "ldtr": value(&system.ldtr), "tr": value(&system.tr),
    });
    if !system.efer.contains(Efer::LMA) {
        request["sys"]["cr0"] = hex(system.cr0.bits()).into();
        request["sys"]["cr4"] = hex(system.cr4.bits()).into();
        request["sys"]["efer"] = hex(system.efer.bits()).into();
    }
    request["want"] = json!(["regs", "segs", "memdelta"]);
    let global = (0..=arena::GDT_LIMIT).step_by(8).flat_map(|s| linux_descriptor(s).unwrap_or(0).to_le_bytes());
    let local = LDT.iter().flat_map(|e| e.descriptor().low.to_le_bytes());
    mem.push(json!({ "addr": hex(system.gdtr.base), "hex": bytes(&global.collect::<Vec<_>>()) }));
    mem.push(json!({ "addr": hex(system.ldtr.base), "hex": bytes(&local.collect::<Vec<_>>()) }));
}

/// An outcome in short, for people.
pub fn outcome(o: &Outcome) -> Value {
    json!({
        "end": format!("{:x?}", o.end), "rip": hex(o.rip), "rflags": hex(o.rflags),
        "gpr": o.gpr.map(hex), "mxcsr": hex(o.xsave.mxcsr().into()), "fsw": hex(o.xsave.fsw().into()),
    })
}

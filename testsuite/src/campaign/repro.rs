//! A case as a request of `bivisor exec`: what is needed to see a divergence again, without the campaign.

use super::arena::PAGES;
use super::case::Case;
use super::outcome::Outcome;
use crate::lockstep::repro::{bytes, hex, rights, wide};
use bivisor_emulator::mem::PAGE_SIZE;
use serde_json::{Value, json};

/// The request: the pages that the case can touch with their rights, its code and its data.
pub fn request(case: &Case, pristine: &[u8]) -> Value {
    let names = ["rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"];
    let mut regs = serde_json::Map::new();
    for (i, v) in case.gpr.iter().enumerate() {
        let name = names.get(i).map_or(format!("r{i}"), ToString::to_string);
        regs.insert(name, hex(*v).into());
    }
    regs.insert("rip".into(), hex(case.rip).into());
    regs.insert("rflags".into(), hex(case.rflags).into());
    let windows = case.windows.iter().map(|w| (w.0, u64::from(w.1)));
    let touched: Vec<_> = windows.chain([(case.rip, case.code.len() as u64 + 1)]).collect();
    let near = |page: u64| touched.iter().any(|&(at, len)| page <= at + len && at < page + PAGE_SIZE);
    let pages = PAGES.iter().flat_map(|&(start, len, prot)| {
        (start..start + len).step_by(PAGE_SIZE as usize).filter(|p| near(*p)).map(move |p| (p, prot))
    });
    let mut mem: Vec<Value> = pages
        .map(|(p, prot)| json!({ "addr": hex(p), "fill": "00", "len": PAGE_SIZE, "rights": rights(prot) }))
        .collect();
    mem.push(json!({ "addr": hex(case.rip), "hex": bytes(&case.code) }));
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
    let x = &case.xsave;
    let mut request = json!({
        "id": "repro", "mode": "long64", "cpl": 3, "regs": regs, "mem": mem, "stop": { "insns": 1 },
        "segs": { "fs": { "sel": "0x0", "base": hex(case.fs_base), "limit": "0xffffffff", "attr": "0xc0f3" } },
        "want": ["regs", "memdelta"],
    });
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
        request["want"] = json!(["regs", "fpu", "vec", "memdelta"]);
    }
    request
}

/// An outcome in short, for people.
pub fn outcome(o: &Outcome) -> Value {
    json!({
        "end": format!("{:x?}", o.end), "rip": hex(o.rip), "rflags": hex(o.rflags),
        "gpr": o.gpr.map(hex), "mxcsr": hex(o.xsave.mxcsr().into()), "fsw": hex(o.xsave.fsw().into()),
    })
}

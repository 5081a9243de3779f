//! A stretch of a process as a request of `bivisor exec`: registers, the pages it touches with their rights, and how many instructions.

use bivisor_emulator::cpu::CpuState;
use bivisor_emulator::isa::{Gpr, Seg};
use bivisor_emulator::mem::Prot;
use serde_json::{Map, Value, json};

/// A number as requests write it.
pub fn hex(v: u64) -> String {
    format!("{v:#x}")
}

/// Little-endian bytes as the digits of a number.
pub fn wide(bytes: &[u8]) -> String {
    let digits: String = bytes.iter().rev().map(|b| format!("{b:02x}")).collect();
    format!("0x{digits}")
}

/// Bytes in memory order.
pub fn bytes(b: &[u8]) -> String {
    b.iter().map(|b| format!("{b:02x}")).collect()
}

/// Rights as requests write them.
pub fn rights(prot: Prot) -> String {
    let letters = [(Prot::READ, 'r'), (Prot::WRITE, 'w'), (Prot::EXEC, 'x')];
    // What can be written or executed can be read.
    let prot = if prot.is_empty() { prot } else { prot | Prot::READ };
    let text: String = letters.iter().filter(|(p, _)| prot.contains(*p)).map(|(_, c)| c).collect();
    if text.is_empty() { "none".into() } else { text }
}

/// The request; what a page holds is written without the zeros at its ends.
pub fn request(start: &CpuState, pages: &[(u64, Prot, Vec<u8>)], instructions: u64) -> Value {
    let mut regs: Map<String, Value> =
        Gpr::ALL.iter().map(|r| (r.name().to_owned(), hex(start.gpr[*r as usize]).into())).collect();
    regs.insert("rip".into(), hex(start.rip).into());
    regs.insert("rflags".into(), hex(start.rflags.bits()).into());
    let segs: Map<String, Value> = Seg::ALL
        .iter()
        .map(|r| {
            let s = start.segment(*r);
            let v = json!({ "sel": hex(s.selector.into()), "base": hex(s.base), "limit": hex(s.limit.into()),
                "attr": hex(s.attr.bits().into()) });
            (Seg::NAMES[*r as usize].to_owned(), v)
        })
        .collect();
    let x = &start.xsave;
    let mut vec = Map::new();
    for i in 0..32 {
        let v = x.zmm(i);
        if v != [0; 64] {
            vec.insert(format!("zmm{i}"), wide(&v).into());
        }
    }
    for i in (0..8).filter(|i| x.opmask(*i) != 0) {
        vec.insert(format!("k{i}"), hex(x.opmask(i)).into());
    }
    let mut mem = Vec::new();
    for (addr, prot, content) in pages {
        mem.push(json!({ "addr": hex(*addr), "fill": "00", "len": content.len(), "rights": rights(*prot) }));
        let first = content.iter().position(|b| *b != 0);
        let last = content.iter().rposition(|b| *b != 0);
        if let (Some(first), Some(last)) = (first, last) {
            mem.push(json!({ "addr": hex(addr + first as u64), "hex": bytes(&content[first..=last]) }));
        }
    }
    json!({
        "id": "repro", "mode": "long64", "cpl": 3, "memory": "flat",
        "regs": regs, "segs": segs, "vec": vec,
        "fpu": {
            "fcw": hex(x.fcw().into()), "fsw": hex(x.fsw().into()), "ftw_abridged": hex(x.ftw_abridged().into()),
            "fop": hex(x.fop().into()), "fip": hex(x.fip()), "fdp": hex(x.fdp()),
            "st": (0..8).map(|i| wide(&x.st(i))).collect::<Vec<_>>(), "mxcsr": hex(x.mxcsr().into()),
        },
        "mem": mem, "stop": { "insns": instructions },
        "want": ["regs", "segs", "fpu", "vec", "memdelta"],
    })
}

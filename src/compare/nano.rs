//! Nanobenchmarks after Adams and Agesen (ASPLOS 2006): one operation of a ring-0 guest in a loop, on every engine.

use super::natively::{Instead, PORTS, PRIVILEGED, Way};
use crate::guest::EXIT;
use crate::guest::{
    Engine, FAST, Gate, Guest, KCODE, KDATA, PARAM, RAISE, Reason, STACK, UCODE, UDATA, USER_STACK, WINDOW,
    WINDOW_TABLE,
};
use anyhow::Result;
use iced_x86::code_asm::*;
use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// One operation.
pub struct Nano {
    /// Its name.
    pub name: &'static str,
    /// What is done.
    pub what: &'static str,
    /// What decides who wins.
    pub why: &'static str,
    /// Exit reason of VT-x for it with the usual controls.
    pub vtx: Option<u16>,
    /// The row of Adams and Agesen's figure: cycles native, translated, VT-x on a Pentium 4 672.
    pub paper: Option<[u32; 3]>,
    /// What a process can do of it.
    pub native: Way,
    /// How often it stands in one turn of the loop, so that the loop itself hardly counts.
    pub copies: u32,
    /// Emits the operation; R15 is the loop's, R14 and R13 are prepared.
    body: fn(&mut CodeAssembler) -> Result<()>,
    /// Runs in ring 3.
    user: bool,
}

const VECTOR: u8 = 0x40;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// mov rax, rsp; push 0x2b; push rax; pushfq; push 0x33; lea rax, [rip + 3]; push rax; iretq: with Linux's selectors for users.
const IRET: &[u8] =
    &[0x48, 0x89, 0xe0, 0x6a, 0x2b, 0x50, 0x9c, 0x6a, 0x33, 0x48, 0x8d, 0x05, 3, 0, 0, 0, 0x50, 0x48, 0xcf];

/// Operations of one instruction that can stand many times in a row; PUSHF and POPF move the stack by [`COPIES`] words a turn.
const ALONE: [&str; 11] = ["rdmsr", "wrmsr", "in", "out", "cr8wr", "pushf", "popf", "cli", "sti", "cpuid", "rdtsc"];
const COPIES: u32 = 16;

fn seq(
    a: &mut CodeAssembler,
    f: impl FnOnce(&mut CodeAssembler) -> std::result::Result<(), iced_x86::IcedError>,
) -> Result<()> {
    f(a)?;
    Ok(())
}

/// All, in the paper's order, then ours.
pub fn all() -> Vec<Nano> {
    let n = |name, what, why, vtx, paper, native, body, user| {
        let copies = if ALONE.contains(&name) { COPIES } else { 1 };
        Nano { name, what, why, vtx, paper, native, copies, body, user }
    };
    vec![
        n(
            "syscall",
            "SYSCALL from ring 3 to ring 0 and back by SYSRET",
            "hardware does both without an exit; software must change what is mapped or checked",
            None,
            Some([242, 2308, 246]),
            Way::Instead(Instead::Syscall),
            |a| seq(a, |a| a.syscall()),
            true,
        ),
        n(
            "in",
            "IN from a device that answers at once",
            "hardware exits to the device's model; the translator calls it",
            Some(30),
            Some([3209, 216, 15826]),
            PORTS,
            |a| seq(a, |a| a.in_(al, i32::from(FAST))),
            false,
        ),
        n(
            "out",
            "OUT to the same device",
            "hardware exits to the device's model; the translator calls it",
            Some(30),
            None,
            PORTS,
            |a| seq(a, |a| a.out(i32::from(FAST), al)),
            false,
        ),
        n(
            "cr8wr",
            "MOV to CR8, the task priority",
            "with a TPR shadow hardware needs no exit; software stores a variable",
            Some(28),
            Some([150, 35, 177]),
            PRIVILEGED,
            |a| seq(a, |a| a.mov(cr8, r14)),
            false,
        ),
        n(
            "call/ret",
            "a call and its return",
            "innocuous: hardware runs it as it is; a translator must find the translated return address",
            None,
            Some([11, 51, 11]),
            Way::Code(&[0xe8, 2, 0, 0, 0, 0xeb, 1, 0xc3]),
            |a| {
                let (mut f, mut over) = (a.create_label(), a.create_label());
                a.call(f)?;
                a.jmp(over)?;
                a.set_label(&mut f)?;
                a.ret()?;
                a.set_label(&mut over)?;
                a.nop()?;
                Ok(())
            },
            false,
        ),
        n(
            "pgfault",
            "a page fault that the guest handles",
            "with nested paging the fault is the guest's alone; shadow paging has to ask whose it is",
            None,
            Some([1093, 3927, 11242]),
            Way::Instead(Instead::PageFault),
            |a| seq(a, |a| a.mov(al, byte_ptr(r13))),
            false,
        ),
        n(
            "divzero",
            "a division by zero that the guest handles",
            "hardware delivers it to the guest; software delivers it in software",
            None,
            Some([889, 3223, 1014]),
            Way::Instead(Instead::Division),
            |a| seq(a, |a| a.div(r14)),
            false,
        ),
        n(
            "ptemod",
            "a store to a page-table entry, unchanged",
            "with nested paging a plain store; with traces a fault",
            None,
            Some([1, 391, 12733]),
            Way::Instead(Instead::Protect),
            |a| seq(a, |a| a.mov(qword_ptr(r12), rbx)),
            false,
        ),
        n(
            "remap",
            "present to absent and back, INVLPG, a touch",
            "with nested paging no exit; shadows are refilled by hidden faults",
            Some(14),
            None,
            Way::Instead(Instead::Remap),
            |a| {
                a.and(qword_ptr(r12), !1)?;
                a.invlpg(ptr(rdi))?;
                a.or(qword_ptr(r12), 1)?;
                a.invlpg(ptr(rdi))?;
                a.mov(eax, dword_ptr(rdi))?;
                Ok(())
            },
            false,
        ),
        n(
            "pushf",
            "PUSHF",
            "never exits under VT-x; at CPL 3 it shows the wrong flags",
            None,
            None,
            Way::Code(&[0x9c, 0x58]),
            |a| seq(a, |a| a.pushfq()),
            false,
        ),
        n(
            "popf",
            "POPF with IF set",
            "never exits under VT-x; at CPL 3 it is silently wrong, whatever it costs",
            None,
            None,
            Way::Code(&[0x9c, 0x9d]),
            |a| seq(a, |a| a.popfq()),
            false,
        ),
        n(
            "cli",
            "CLI",
            "never exits under VT-x; the translator clears a bit in memory; trap-and-emulate traps",
            None,
            None,
            PRIVILEGED,
            |a| seq(a, |a| a.cli()),
            false,
        ),
        n(
            "sti",
            "STI with IF set",
            "never exits under VT-x; the translator sets a bit in memory; trap-and-emulate traps",
            None,
            None,
            PRIVILEGED,
            |a| seq(a, |a| a.sti()),
            false,
        ),
        n(
            "cli/sti",
            "CLI, then STI",
            "never exits under VT-x; the translator sets a bit in memory; trap-and-emulate traps twice",
            None,
            None,
            PRIVILEGED,
            |a| {
                seq(a, |a| {
                    a.cli()?;
                    a.sti()
                })
            },
            false,
        ),
        n(
            "cpuid",
            "CPUID",
            "always exits under VT-x; software looks a table up",
            Some(10),
            None,
            Way::Code(&[0x31, 0xc0, 0x0f, 0xa2]),
            |a| {
                seq(a, |a| {
                    a.xor(eax, eax)?;
                    a.cpuid()
                })
            },
            false,
        ),
        n(
            "rdtsc",
            "RDTSC",
            "exits only if the monitor wants it to",
            Some(16),
            None,
            Way::Code(&[0x0f, 0x31]),
            |a| seq(a, |a| a.rdtsc()),
            false,
        ),
        n(
            "rdmsr",
            "RDMSR of IA32_KERNEL_GS_BASE",
            "exits unless a bitmap says otherwise; software loads a variable",
            Some(31),
            None,
            PRIVILEGED,
            |a| {
                seq(a, |a| {
                    a.mov(ecx, KERNEL_GS_BASE)?;
                    a.rdmsr()
                })
            },
            false,
        ),
        n(
            "wrmsr",
            "WRMSR of IA32_KERNEL_GS_BASE",
            "exits unless a bitmap says otherwise; software checks and stores a variable",
            Some(32),
            None,
            PRIVILEGED,
            |a| {
                seq(a, |a| {
                    a.mov(ecx, KERNEL_GS_BASE)?;
                    a.xor(edx, edx)?;
                    a.wrmsr()
                })
            },
            false,
        ),
        n(
            "iret",
            "IRET to the next instruction",
            "never exits under VT-x; software checks segments and flags by itself",
            None,
            None,
            Way::Code(IRET),
            |a| {
                let mut next = a.create_label();
                a.mov(rax, rsp)?;
                a.push(i32::from(KDATA))?;
                a.push(rax)?;
                a.pushfq()?;
                a.push(i32::from(KCODE))?;
                a.lea(rax, ptr(next))?;
                a.push(rax)?;
                a.iretq()?;
                a.set_label(&mut next)?;
                a.nop()?;
                Ok(())
            },
            false,
        ),
        n(
            "interrupt",
            "an external interrupt, raised by OUT, and its IRET",
            "hardware exits for the OUT and injects at the next entry",
            Some(30),
            None,
            Way::Instead(Instead::Signal),
            |a| {
                seq(a, |a| {
                    a.mov(al, i32::from(VECTOR))?;
                    a.out(i32::from(RAISE), al)?;
                    a.nop()
                })
            },
            false,
        ),
        n(
            "cr3",
            "MOV to CR3: a change of address space",
            "with nested paging no exit; shadows and TLBs in software are thrown away",
            Some(28),
            None,
            Way::Instead(Instead::Switch),
            |a| {
                seq(a, |a| {
                    a.mov(rax, cr3)?;
                    a.mov(cr3, rax)
                })
            },
            false,
        ),
    ]
}

/// STAR, LSTAR, FMASK.
fn msr(a: &mut CodeAssembler, number: u32, value: u64) -> Result<()> {
    a.mov(ecx, number)?;
    a.mov(eax, value as u32)?;
    a.mov(edx, (value >> 32) as u32)?;
    a.wrmsr()?;
    Ok(())
}

/// The guest around an operation; without one an empty loop, to be subtracted.
fn guest(body: Option<&Nano>) -> Result<Guest> {
    let user = body.is_some_and(|b| b.user);
    Guest::new(|a| {
        let (mut user_code, mut syscalls, mut over) = (a.create_label(), a.create_label(), a.create_label());
        let mut again = a.create_label();
        // What operations find: an absent page, a zero divisor, a page-table entry and its page.
        a.mov(r15, qword_ptr(PARAM))?;
        a.xor(r14d, r14d)?;
        a.mov(r13, WINDOW + 4096 * 5)?;
        a.mov(r12, WINDOW_TABLE)?;
        a.mov(rdi, WINDOW)?;
        a.and(qword_ptr(WINDOW_TABLE + 8 * 5), 0)?;
        a.invlpg(ptr(r13))?;
        a.xor(edx, edx)?;
        match user {
            true => {
                msr(a, 0xc000_0080, 0xd01)?;
                // SYSRET to 64-bit code adds 16, its SS 8.
                msr(a, 0xc000_0081, u64::from(UDATA - 8) << 48 | u64::from(KCODE) << 32)?;
                a.lea(rax, ptr(syscalls))?;
                a.mov(rdx, rax)?;
                a.shr(rdx, 32)?;
                a.mov(ecx, 0xc000_0082u32)?;
                a.wrmsr()?;
                msr(a, 0xc000_0084, 0x700)?;
                a.push(i32::from(UDATA))?;
                a.mov(rax, USER_STACK)?;
                a.push(rax)?;
                a.push(0x2)?;
                a.push(i32::from(UCODE))?;
                a.lea(rax, ptr(user_code))?;
                a.push(rax)?;
                a.iretq()?;
            }
            false => {
                a.sti()?;
                a.pushfq()?;
                a.pop(rbx)?;
                // The entry as it is, for an unchanged store; flags with IF, for POPF.
                match body.map(|b| b.name) {
                    Some("ptemod") => a.mov(rbx, qword_ptr(r12))?,
                    Some("popf") => {
                        for _ in 0..COPIES {
                            a.push(rbx)?;
                        }
                    }
                    _ => {}
                }
                a.jmp(user_code)?;
            }
        }
        a.set_label(&mut user_code)?;
        a.nop()?;
        a.set_label(&mut again)?;
        if let Some(b) = body {
            for _ in 0..b.copies {
                (b.body)(a)?;
            }
            // The stack is for the next turn as it was for this one.
            match b.name {
                "pushf" => a.lea(rsp, qword_ptr(rsp + 8 * b.copies))?,
                "popf" => a.lea(rsp, qword_ptr(rsp - 8 * b.copies))?,
                _ => {}
            }
        }
        a.dec(r15)?;
        a.jnz(again)?;
        if user {
            // Back to ring 0 by an argument.
            a.mov(r14d, 1)?;
            a.syscall()?;
        }
        a.out(i32::from(EXIT), al)?;
        a.cli()?;
        a.hlt()?;
        a.set_label(&mut syscalls)?;
        a.test(r14d, r14d)?;
        a.jnz(over)?;
        a.sysretq()?;
        a.set_label(&mut over)?;
        a.out(i32::from(EXIT), al)?;
        a.cli()?;
        a.hlt()?;
        // Handlers: the interrupt's, and two that go on behind the operation, which is 4 and 3 bytes long.
        let (mut interrupt, mut fault, mut divide) = (a.create_label(), a.create_label(), a.create_label());
        a.set_label(&mut interrupt)?;
        a.iretq()?;
        a.set_label(&mut fault)?;
        a.add(rsp, 8)?;
        a.add(qword_ptr(rsp), 4)?;
        a.iretq()?;
        a.set_label(&mut divide)?;
        a.add(qword_ptr(rsp), 3)?;
        a.iretq()?;
        Ok(vec![
            Gate { vector: VECTOR, dpl: 0, label: interrupt },
            Gate { vector: 14, dpl: 0, label: fault },
            Gate { vector: 0, dpl: 0, label: divide },
        ])
    })
}

/// What one operation costs on one engine.
#[derive(Clone, Debug)]
pub struct Cost {
    /// Nanoseconds: the median.
    pub median: f64,
    /// The smallest and the largest.
    pub spread: [f64; 2],
    /// Times that the engine was left for one operation, by reason.
    pub ledger: BTreeMap<Reason, f64>,
}

/// Nanoseconds that this thread has had of a processor.
pub fn processor_time() -> f64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
    t.tv_sec as f64 * 1e9 + t.tv_nsec as f64
}

/// Turns that the interpreter is stepped through, for its ledger.
const STEPPED: u64 = 8;

/// One guest on one engine.
pub struct Bench {
    guest: Guest,
    engine: Engine,
    copies: u32,
}

impl Bench {
    /// Of an operation, or of the empty loop.
    ///
    /// # Errors
    /// The engine is not to be had here.
    pub fn new(engine: &str, nano: Option<&Nano>) -> Result<Bench> {
        Ok(Bench { guest: guest(nano)?, engine: Engine::new(engine)?, copies: nano.map_or(1, |n| n.copies) })
    }

    /// Of a guest that does something as often as [`PARAM`] says.
    pub fn of(guest: Guest, engine: Engine) -> Bench {
        Bench { guest, engine, copies: 1 }
    }

    fn time(&mut self, turns: u64) -> Result<f64> {
        self.guest.poke(PARAM, turns);
        let (start, cpu) = (Instant::now(), processor_time());
        self.guest.run(&mut self.engine, Duration::from_millis(1500))?;
        // The other programs of a busy host do not count; but trap-and-emulate works in two processes.
        let apart = matches!(self.engine, Engine::Trap(_));
        Ok(if apart { start.elapsed().as_nanos() as f64 } else { processor_time() - cpu })
    }

    /// What the engine has counted; of the interpreter, what that many turns are made of.
    fn ledger(&self, turns: u64) -> Result<BTreeMap<Reason, u64>> {
        match self.engine {
            Engine::Interp(_) => {
                self.guest.poke(PARAM, turns);
                self.guest.profile(100_000)
            }
            _ => Ok(self.engine.ledger()),
        }
    }

    /// Nanoseconds a turn, `samples` times, each of at least `least`.
    ///
    /// # Errors
    /// The guest does not come to its end.
    pub fn measure(&mut self, samples: usize, least: Duration) -> Result<Cost> {
        let base = (0..3).map(|_| self.time(1)).collect::<Result<Vec<_>>>()?.into_iter().fold(f64::MAX, f64::min);
        let mut turns = 16;
        let mut elapsed = self.time(turns)?;
        while elapsed - base < least.as_nanos() as f64 && turns < 1 << 22 {
            turns *= 4;
            elapsed = self.time(turns)?;
        }
        let before = self.ledger(1)?;
        let mut seen: Vec<f64> = Vec::new();
        for _ in 0..samples {
            seen.push((self.time(turns)? - base).max(0.0) / (turns - 1) as f64);
        }
        let counted = if matches!(self.engine, Engine::Interp(_)) { STEPPED } else { turns * samples as u64 };
        let done = (counted * u64::from(self.copies)) as f64;
        let ledger = self.ledger(1 + STEPPED)?.into_iter().filter_map(|(reason, n)| {
            let new = n.saturating_sub(before.get(&reason).copied().unwrap_or(0)) as f64 / done;
            (new > 0.05).then_some((reason, new))
        });
        seen.sort_by(f64::total_cmp);
        Ok(Cost { median: seen[seen.len() / 2], spread: [seen[0], seen[seen.len() - 1]], ledger: ledger.collect() })
    }
}

const _: () = assert!(STACK < WINDOW);

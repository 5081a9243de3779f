//! Small ring-0 guests, assembled here and now: a flat address space, tables of their own, the testsuite's board, any engine.

use crate::classify::theorem::name;
pub use crate::trap::Reason;
use crate::trap::TrapVcpu;
use anyhow::{Result, anyhow, bail};
use bivisor_emulator::bus::Bus;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::cpu::{CpuState, Rflags};
use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::isa::{Gpr, Sensitivity, Width, decode, exits};
use bivisor_emulator::mem::{GuestMemory, Ram};
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Kicker, Vcpu};
use bivisor_kvm_backend::{KvmVcpu, KvmVm};
use bivisor_testsuite::board::Ports;
pub use bivisor_testsuite::board::{EXIT, RAISE, REPORT};
use bivisor_translator::Translator;
use iced_x86::Code;
use iced_x86::code_asm::CodeAssembler;
use std::any::Any;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

/// Where the code lies.
pub const CODE: u64 = 0x10_0000;
/// The stack pointer it starts with.
pub const STACK: u64 = 0x9_0000;
/// GDT, IDT, TSS.
pub const GDT: u64 = 0x2_0000;
/// See [`GDT`].
pub const IDT: u64 = 0x2_1000;
/// See [`GDT`].
pub const TSS: u64 = 0x2_3000;
/// Selectors: unlike Linux's, so that what shows the host's can be told.
pub const KCODE: u16 = 0x48;
/// Data of the kernel.
pub const KDATA: u16 = 0x50;
/// Data, then code of the user: as SYSRET wants them.
pub const UDATA: u16 = 0x5b;
/// See [`UDATA`].
pub const UCODE: u16 = 0x63;
/// The task register.
pub const TSSSEL: u16 = 0x70;
/// Level 4, 3, 2 of the page tables; the level 1 of the window is at the end.
const TABLES: u64 = 0x3_0000;
/// The level 1 table of [`WINDOW`].
pub const WINDOW_TABLE: u64 = TABLES + 0x3000;
/// 2 MiB in pages of 4 KiB; the other memory is in pages of 2 MiB.
pub const WINDOW: u64 = 0x80_0000;
/// RAM.
const RAM: u64 = 16 << 20;

/// A number that the host gives the guest.
pub const PARAM: u64 = 0x7_0000;
/// Where the user's stack ends.
pub const USER_STACK: u64 = 0xb_0000;

/// A port that does nothing, at once.
pub const FAST: u16 = 0x80;
/// An engine for these guests.
pub enum Engine {
    /// The interpreter.
    Interp(Box<Interpreter>),
    /// The translator, for its counters.
    Bt(Box<Translator>),
    /// Trap-and-emulate, for its ledger.
    Trap(Box<TrapVcpu>),
    /// KVM, for its counters.
    Kvm(Box<KvmVcpu>),
}

/// The names of all, in the order of pages and tables.
pub const ENGINES: [&str; 4] = ["interp", "bt", "trap", "kvm"];

impl Engine {
    /// By name.
    ///
    /// # Errors
    /// Why it is not to be had here.
    pub fn new(name: &str) -> Result<Engine> {
        let model = Arc::new(CpuModel::host());
        Ok(match name {
            "interp" => Engine::Interp(Box::new(Interpreter::new(model))),
            "bt" => Engine::Bt(Box::new(Translator::new(model)?)),
            "trap" => Engine::Trap(Box::new(TrapVcpu::new(model))),
            "kvm" => Engine::Kvm(Box::new(KvmVm::new(model).map_err(|e| anyhow!(e))?.vcpu())),
            _ => bail!("there is no engine {name}"),
        })
    }

    fn vcpu(&mut self) -> &mut dyn Vcpu {
        match self {
            Engine::Interp(v) => &mut **v,
            Engine::Bt(v) => &mut **v,
            Engine::Trap(v) => &mut **v,
            Engine::Kvm(v) => &mut **v,
        }
    }

    /// Why and how often the guest was left, by the engine's own counters. The interpreter never enters a guest: what it does there is
    /// [`Guest::profile`].
    pub fn ledger(&self) -> BTreeMap<Reason, u64> {
        match self {
            Engine::Interp(v) => ledger(&**v),
            Engine::Bt(v) => ledger(&**v),
            Engine::Trap(v) => ledger(&**v),
            Engine::Kvm(v) => ledger(&**v),
        }
    }
}

/// See [`Engine::ledger`]; for any engine.
pub fn ledger(engine: &dyn Any) -> BTreeMap<Reason, u64> {
    let mut out = BTreeMap::new();
    if let Some(v) = engine.downcast_ref::<TrapVcpu>() {
        out = v.ledger.clone();
    } else if let Some(v) = engine.downcast_ref::<KvmVcpu>() {
        out = v.counts().into_iter().map(|(c, n)| ((c.vtx, format!("{} ({})", c.what, c.name)), n)).collect();
        out.insert((None, "KVM cannot do it: one step of the interpreter".into()), v.assists());
    } else if let Some(v) = engine.downcast_ref::<Translator>() {
        let called = v.called();
        let s = v.stats();
        let known: u64 = called.values().sum();
        for (code, n) in called {
            let (reason, name) = reason_of(code);
            *out.entry((reason, format!("call-out: {name}"))).or_default() += n;
        }
        out.extend(
            [
                ("call-out: a stretch that is not translated", s.steps.saturating_sub(known)),
                ("not in the inline TLB", s.tlb_misses),
                ("to a block not linked yet", s.to_block),
                ("target of an indirect branch not found", s.misses),
                ("exception in translated code", s.faults),
            ]
            .map(|(name, n)| ((None, name.to_string()), n)),
        );
    }
    out.retain(|_, n| *n > 0);
    out
}

/// What leaving at an instruction is called, with the basic exit reason of VT-x. (Task switches, for which far transfers leave hardware,
/// are not what these guests do.)
pub fn reason_of(code: Code) -> Reason {
    (exits::hardware(code).vtx.reason.filter(|r| *r != 9), name(code))
}

/// When which engine is to be stopped, though its guest does nothing that leaves it.
static DEADLINE: Mutex<Option<(Instant, Kicker)>> = Mutex::new(None);

fn lock() -> std::sync::MutexGuard<'static, Option<(Instant, Kicker)>> {
    DEADLINE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// One thread for all guests that looks whether a deadline has come.
fn watch(deadline: Option<(Instant, Kicker)>) {
    static WATCHER: Once = Once::new();
    WATCHER.call_once(|| {
        std::thread::spawn(|| {
            loop {
                std::thread::sleep(Duration::from_millis(50));
                let guard = lock();
                if let Some((at, kicker)) = guard.as_ref()
                    && Instant::now() > *at
                {
                    kicker.kick();
                }
            }
        });
    });
    *lock() = deadline;
}

/// A guest in memory.
pub struct Guest {
    mem: GuestMemory,
    entry: u64,
    ports: Ports,
    /// Addresses of the handlers, and their vectors.
    handlers: BTreeMap<u64, u8>,
}

/// A 64-bit gate.
fn gate(handler: u64, dpl: u64) -> [u64; 2] {
    let low = handler & 0xffff | u64::from(KCODE) << 16 | (0x8e00 | dpl << 13) << 32 | (handler >> 16 & 0xffff) << 48;
    [low, handler >> 32]
}

impl Guest {
    /// Assembles it with `build`, which gives `(vector, DPL, label)` of its handlers.
    ///
    /// # Errors
    /// The assembler's, or no memory.
    pub fn new(build: impl FnOnce(&mut CodeAssembler) -> Result<Vec<Gate>>) -> Result<Guest> {
        let mut a = CodeAssembler::new(64)?;
        let gates = build(&mut a)?;
        let options = iced_x86::BlockEncoderOptions::RETURN_NEW_INSTRUCTION_OFFSETS;
        let made = a.assemble_options(CODE, options)?;
        let mem = GuestMemory::Ram(Ram::shared(RAM)?);
        let put = |at: u64, v: u64| mem.store(at, Width::Q, v).ok_or_else(|| anyhow!("no RAM at {at:#x}"));
        mem.write(CODE, &made.inner.code_buffer).ok_or_else(|| anyhow!("the code is too long"))?;
        let mut handlers = BTreeMap::new();
        for g in gates {
            let address = made.label_ip(&g.label)?;
            handlers.insert(address, g.vector);
            let [low, high] = gate(address, g.dpl);
            put(IDT + 16 * u64::from(g.vector), low)?;
            put(IDT + 16 * u64::from(g.vector) + 8, high)?;
        }
        put(TABLES, TABLES + 0x1007)?;
        put(TABLES + 0x1000, TABLES + 0x2007)?;
        for n in 0..RAM >> 21 {
            put(TABLES + 0x2000 + 8 * n, n << 21 | 0xe7)?;
        }
        put(TABLES + 0x2000 + 8 * (WINDOW >> 21), WINDOW_TABLE | 7)?;
        for n in 0..512 {
            put(WINDOW_TABLE + 8 * n, (WINDOW + n * 4096) | 0x67)?;
        }
        let tss = [TSS << 16 & 0xff_ffff_0000 | (TSS >> 24) << 56 | 0x8b << 40 | 0x67, TSS >> 32];
        for (selector, v) in [
            (KCODE, 0x00af_9b00_0000_ffff),
            (KDATA, 0x00cf_9300_0000_ffff),
            (UDATA, 0x00cf_f300_0000_ffff),
            (UCODE, 0x00af_fb00_0000_ffff),
            (TSSSEL, tss[0]),
            (TSSSEL + 8, tss[1]),
        ] {
            put(GDT + u64::from(selector & !7), v)?;
        }
        mem.write(TSS + 4, &STACK.to_le_bytes()).ok_or_else(|| anyhow!("no TSS"))?;
        Ok(Guest { mem, entry: CODE, ports: Ports::default(), handlers })
    }

    /// Stores a number in its memory.
    pub fn poke(&self, at: u64, v: u64) {
        self.mem.store(at, Width::Q, v);
    }

    /// Runs it to its end from the start; gives its report.
    ///
    /// # Errors
    /// What went wrong, and where.
    pub fn run(&self, engine: &mut Engine, limit: Duration) -> Result<BTreeMap<u16, u32>> {
        let vcpu = engine.vcpu();
        self.power_on(vcpu);
        let board = Board { mem: &self.mem, bus: &self.ports };
        let start = Instant::now();
        watch(Some((start + limit, vcpu.kicker())));
        loop {
            let exit = vcpu.run(board, u64::MAX);
            if self.ports.status().is_some() {
                watch(None);
                return Ok(self.ports.report());
            }
            match exit {
                Exit::Budget | Exit::Kicked if start.elapsed() < limit => {}
                Exit::Halt if self.ports.interrupt_pending() && start.elapsed() < limit => {}
                exit => {
                    watch(None);
                    let rip = vcpu.state().rip;
                    bail!("{exit:?} at {rip:#x} after {:?}", start.elapsed());
                }
            }
        }
    }

    /// What it does, counted by single steps of the interpreter: sensitive instructions, and exceptions and interrupts delivered.
    ///
    /// # Errors
    /// It does not come to its end within `most` instructions.
    pub fn profile(&self, most: u64) -> Result<BTreeMap<Reason, u64>> {
        let mut out: BTreeMap<Reason, u64> = BTreeMap::new();
        let mut vcpu = Interpreter::new(Arc::new(CpuModel::host()));
        self.power_on(&mut vcpu);
        let board = Board { mem: &self.mem, bus: &self.ports };
        for _ in 0..most {
            let s = vcpu.state();
            let due = s.rflags.contains(Rflags::IF) && !s.interrupt_shadow && self.ports.interrupt_pending();
            // An interrupt is taken before the next instruction, which then is its handler's first.
            let taken = self.handlers.iter().find(|(_, vector)| due && **vector >= 32);
            let before = taken.map_or(s.rip, |(handler, _)| *handler);
            let mut bytes = [0; 15];
            // Its code is where it was put, mapped one to one.
            let insn = self.mem.read(before, &mut bytes).and_then(|()| decode(&bytes, 64).ok());
            let exit = vcpu.run(board, 1);
            if let Some((_, vector)) = taken {
                *out.entry((Some(1), format!("interrupt {vector} delivered"))).or_default() += 1;
            }
            if let Some(vector) = self.handlers.get(&vcpu.state().rip).filter(|v| **v < 32) {
                *out.entry((Some(0), format!("exception {vector} delivered"))).or_default() += 1;
            }
            if let Some(i) = insn.filter(|i| i.facts.sensitivity != Sensitivity::Innocuous) {
                *out.entry(reason_of(i.iced.code())).or_default() += 1;
            }
            match exit {
                _ if self.ports.status().is_some() => return Ok(out),
                Exit::Budget => {}
                exit => bail!("{exit:?} at {before:#x}"),
            }
        }
        bail!("not done after {most} instructions")
    }

    /// The state it starts in.
    fn power_on(&self, vcpu: &mut dyn Vcpu) {
        self.ports.reset();
        let mut s = CpuState::long64(0);
        s.seg[1].selector = KCODE;
        s.seg[2].selector = KDATA;
        s.cr3 = TABLES;
        (s.gdtr.base, s.gdtr.limit) = (GDT, 0x7f);
        (s.idtr.base, s.idtr.limit) = (IDT, 0xfff);
        s.tr = bivisor_emulator::cpu::Segment {
            base: TSS,
            limit: 0x67,
            attr: bivisor_emulator::cpu::Attr::from_bits_retain(0x8b),
            selector: TSSSEL,
        };
        s.rip = self.entry;
        s.gpr[Gpr::Rsp as usize] = STACK;
        s.rflags = Rflags::FIXED;
        *vcpu.state() = s;
        vcpu.set_intercepts(Intercepts::empty());
    }
}

/// A handler of the guest's.
pub struct Gate {
    /// Which vector.
    pub vector: u8,
    /// Who may call it by INT n.
    pub dpl: u64,
    /// Where.
    pub label: iced_x86::code_asm::CodeLabel,
}

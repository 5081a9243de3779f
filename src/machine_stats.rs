//! `bivisor boot --stats`: what the machine's processor did, by the engine's counters and the board's.

use crate::guest;
use crate::stats::Format;
use bivisor_emulator::isa::exits::reason_name;
use bivisor_emulator::machine::Machine;
use bivisor_emulator::vcpu::{Cost, Vcpu};
use bivisor_translator::Translator;
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use std::any::Any;
use std::fmt::Write;
use std::time::{Duration, Instant};

/// When a machine was started, by the clocks of the host.
pub struct Start {
    wall: Instant,
    cpu: Duration,
}

/// Processor time of all threads of this process.
fn processor_time() -> Duration {
    let t = clock_gettime(ClockId::ProcessCPUTime);
    Duration::new(t.tv_sec.max(0) as u64, t.tv_nsec.max(0) as u32)
}

/// One reason for which translated or native code was left, or the chips were turned to.
struct Row {
    /// Intel's basic exit reason (SDM 3D table C-1).
    reason: Option<u16>,
    what: String,
    times: u64,
}

/// What one class of exits, or one kind of accesses to the chips, cost.
struct Spent {
    place: &'static str,
    cost: Cost,
}

impl Start {
    /// Now.
    pub fn now() -> Start {
        Start { wall: Instant::now(), cpu: processor_time() }
    }

    /// The report of a machine that was started then and has stopped.
    pub fn report(&self, machine: &mut Machine, engine: &'static str, format: Format) -> String {
        let (wall, cpu) = (self.wall.elapsed(), processor_time().saturating_sub(self.cpu));
        let (guest, slept) = (machine.time(), machine.slept());
        let (board, chips) = (board(machine), machine.costs());
        let vcpu: &mut (dyn Vcpu + 'static) = machine.vcpu();
        let instructions = vcpu.instructions();
        let measured = vcpu.measured();
        let spent: Vec<Spent> = [(engine, measured.costs.clone()), ("board", chips)]
            .into_iter()
            .flat_map(|(place, costs)| costs.into_iter().map(move |cost| Spent { place, cost }))
            .collect();
        let any: &dyn Any = vcpu;
        let left: Vec<Row> =
            guest::ledger(any).into_iter().map(|((reason, what), times)| Row { reason, what, times }).collect();
        let cache = any.downcast_ref::<Translator>().and_then(Translator::machine_cache);
        let entries = any.downcast_ref::<Translator>().map(|t| t.stats().entries);
        if format == Format::Json {
            let rows = |rows: &[Row]| rows.iter().map(Row::json).collect::<Vec<_>>();
            let translated = cache.map(|c| {
                json!({"blocks": c.blocks, "instructions": c.insns, "stale": c.stale, "flushes": c.flushes, "links": c.links})
            });
            let value = json!({
                "engine": engine, "instructions": instructions, "entries": entries, "translated": translated,
                "left": rows(&left), "board": rows(&board),
                "costs": spent.iter().map(Spent::json).collect::<Vec<_>>(),
                "tlb": {"hits": measured.tlb_hits, "misses": measured.tlb_misses},
                "seconds": {
                    "guest": guest.as_secs_f64(), "wall": wall.as_secs_f64(), "halted": slept.map(|s| s.as_secs_f64()),
                    "processor": cpu.as_secs_f64(),
                },
            });
            return value.to_string();
        }
        let mut out = format!("bivisor: what {engine} did for the machine\n");
        if let Some(n) = instructions {
            let _ = writeln!(out, "  carried out  {n} instructions");
        }
        if let Some(c) = cache {
            let _ = writeln!(out, "  translated   {} blocks, {} instructions", c.blocks, c.insns);
            let _ = writeln!(out, "  connected    {} jumps", c.links);
            let _ = writeln!(out, "  thrown away  {} blocks stale, {} times all", c.stale, c.flushes);
        }
        if let Some(n) = entries {
            let _ = writeln!(out, "  went in      {n} times");
        }
        for (title, rows) in [("came out because of", &left), ("turned to the chips for", &board)] {
            if !rows.is_empty() {
                let _ = writeln!(out, "  {title}");
            }
            rows.iter().for_each(|row| row.text(&mut out));
        }
        if let Some(misses) = measured.tlb_misses {
            let hits = measured.tlb_hits.map(|n| format!("{n} accesses found their page, ")).unwrap_or_default();
            let _ = writeln!(out, "  TLB          {hits}{misses} did not");
        }
        if !spent.is_empty() {
            let _ = writeln!(out, "  it took");
        }
        spent.iter().for_each(|s| s.text(&mut out));
        let s = Duration::as_secs_f64;
        let _ = write!(
            out,
            "  time         {:.3} s in the guest, {:.3} s here, {}; {:.3} s of processor time",
            s(&guest),
            s(&wall),
            slept.map_or("halted in the kernel".into(), |slept| format!("{:.3} s of them halted", s(&slept))),
            s(&cpu)
        );
        out
    }
}

impl Row {
    /// KVM's number and name for it, where it comes to the monitor.
    fn kvm(&self) -> Option<(u32, &str)> {
        let named = self.what.rsplit_once('(').and_then(|(_, name)| name.strip_suffix(')'));
        let own = named.and_then(|name| bivisor_kvm_backend::number(name).map(|n| (n, name)));
        own.or_else(|| bivisor_kvm_backend::returned(self.reason?))
    }

    fn json(&self) -> Value {
        let (number, name) = self.kvm().unzip();
        json!({
            "vtx_reason": self.reason, "vtx_name": self.reason.map(reason_name), "kvm_reason": number, "kvm_name": name,
            "what": self.what, "times": self.times,
        })
    }

    fn text(&self, out: &mut String) {
        let intel = self.reason.map(|n| format!("{n} {}", reason_name(n)));
        let kvm = self.kvm().map(|(n, name)| format!("{name} {n}"));
        let both: Vec<String> = intel.into_iter().chain(kvm).collect();
        let both = if both.is_empty() { String::new() } else { format!("  [{}]", both.join("; ")) };
        let _ = writeln!(out, "    {:>12}  {}{both}", self.times, self.what);
    }
}

impl Spent {
    fn json(&self) -> Value {
        let Spent { place, cost } = self;
        json!({"where": place, "class": cost.class, "times": cost.times, "nanoseconds": cost.time.as_nanos() as u64})
    }

    fn text(&self, out: &mut String) {
        let Spent { place, cost } = self;
        let each = cost.time.as_nanos() / u128::from(cost.times.max(1));
        let _ = writeln!(
            out,
            "    {:>10.3} ms  {place}: {}, {} times, {each} ns each",
            cost.time.as_secs_f64() * 1e3,
            cost.class,
            cost.times
        );
    }
}

/// What every engine turns to the board for. Reasons are those for which hardware would have left the guest.
fn board(machine: &Machine) -> Vec<Row> {
    let t = machine.traffic();
    let rows = [
        (30, "IN", t.port_reads),
        (30, "OUT", t.port_writes),
        (48, "load from an address without RAM", t.memory_reads),
        (48, "store to an address without RAM", t.memory_writes),
        (1, "interrupt taken", t.interrupts),
        (31, "RDMSR or WRMSR of the local APIC", t.msrs),
    ];
    let rows = rows.into_iter().filter(|(.., times)| *times > 0);
    rows.map(|(reason, what, times)| Row { reason: Some(reason), what: what.into(), times }).collect()
}

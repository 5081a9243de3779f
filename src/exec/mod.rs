//! `bivisor exec`: state in, state out, on any engine, one JSON object a line.

mod flat;
mod moo;
mod number;
mod request;
pub mod response;
mod setup;
mod single;
mod world;

use crate::engine::{self, Backend};
use anyhow::{Context, Result};
use bivisor_emulator::cpu::Fault;
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::interp::Core;
use bivisor_emulator::interp::deliver::Event;
use bivisor_emulator::vcpu::{Board, Exit, Intercepts, Vcpu};
use clap::Args;
use number::Num;
use request::{Model, Range, Request, Unmapped, Want, WantItem};
use response::{Exception, Response, Stop};
use std::collections::HashMap;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::sync::Arc;
use world::{Refusal, World};

/// Arguments of `bivisor exec`.
#[derive(Args)]
#[command(after_help = "Examples:\n  \
        bivisor exec --hex '4801c0 f4' --set rax=0x21\n  \
        bivisor exec --example popf --cpl 3 --backend bt\n  \
        bivisor exec --cpu 80286 --moo vectors/40.MOO.gz\n  \
        echo '{\"regs\":{\"rax\":2,\"rip\":\"0x1000\"},\"mem\":[{\"addr\":\"0x1000\",\"hex\":\"4801c0f4\"}],\"want\":[\"regs\"]}' | bivisor exec\n\n\
        Exit status: 0 if all cases were run, whatever became of them; 2 on malformed input.")]
pub struct ExecArgs {
    /// The engine.
    #[arg(long, value_enum, default_value_t = Backend::Interp)]
    backend: Backend,
    /// The offered CPU, unless a case names its own.
    #[arg(long, default_value = "max")]
    cpu: String,
    /// Threads.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=1024))]
    jobs: u16,
    /// Print the JSON Schema of requests and responses.
    #[arg(long)]
    schema: bool,
    /// Run these bytes instead of cases from standard input.
    #[arg(long, value_name = "BYTES")]
    hex: Option<String>,
    /// Run the bytes of a file.
    #[arg(long, value_name = "FILE")]
    flat: Option<PathBuf>,
    /// Run a built-in example: sum, popf, port, fault, sse.
    #[arg(long, value_name = "NAME")]
    example: Option<String>,
    /// Compare single-step vectors of hardware (MOO 1.x, also packed by gzip, of an 80286): per file how many are equal, equal but for
    /// undefined flags, different. With --cpu 80286 what later processors do otherwise by design is counted apart. Status 1 if any differs.
    #[arg(long, value_name = "FILE", num_args = 1.., conflicts_with_all = ["hex", "flat", "example"])]
    moo: Vec<PathBuf>,
    /// For --moo: one JSON object a file.
    #[arg(long)]
    json: bool,
    /// For --hex and --flat: real16, prot16, prot32, compat16, compat32 or long64.
    #[arg(long, default_value = "long64", value_parser = ["real16", "prot16", "prot32", "compat16", "compat32", "long64"])]
    mode: String,
    /// For --hex, --flat and --example: the privilege level.
    #[arg(long, default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=3))]
    cpl: u8,
    /// For --hex, --flat and --example: set a register. May be repeated.
    #[arg(long, value_name = "REGISTER=VALUE")]
    set: Vec<String>,
    /// For --hex, --flat and --example: stop after so many instructions; default: at HLT, INT3 or another exception.
    #[arg(long, value_name = "N")]
    insns: Option<u64>,
}

/// Lines taken at a time by each thread.
const BATCH: usize = 256;

/// Answers each line of standard input with a line on standard output, in order.
pub fn run(args: &ExecArgs) -> Result<i32> {
    if args.schema {
        print!("{}", include_str!("schema.json"));
        return Ok(0);
    }
    let (backend, _) = engine::choose(args.backend, engine::Purpose::Code).map_err(anyhow::Error::msg)?;
    if !args.moo.is_empty() {
        return moo::run(&args.moo, backend, &args.cpu, args.json);
    }
    let mut workers = (0..args.jobs).map(|_| Worker::new(args, backend)).collect::<Result<Vec<_>>>()?;
    let mut out = std::io::stdout().lock();
    if single::given(args) {
        let outcome = serde_json::from_value(single::request(args)?).map_err(|e| e.to_string());
        return match outcome.and_then(|request| workers[0].case(request)) {
            Ok(response) => {
                serde_json::to_writer_pretty(&mut out, &response)?;
                out.write_all(b"\n")?;
                Ok(0)
            }
            Err(why) => {
                eprintln!("bivisor: {why}");
                Ok(2)
            }
        };
    }
    let mut input = BufReader::with_capacity(1 << 20, std::io::stdin().lock());
    let mut number = 0;
    loop {
        let wanted = BATCH * workers.len();
        let mut batch = Vec::new();
        // What is there is answered before more is waited for: the other side may want to see it first.
        while batch.is_empty() || batch.len() < wanted && input.buffer().contains(&b'\n') {
            let mut line = Vec::new();
            if input.read_until(b'\n', &mut line).context("standard input")? == 0 {
                break;
            }
            // JSON is UTF-8: what is not is malformed, as a character that stands for it is.
            batch.push(String::from_utf8(line).unwrap_or_else(|_| "\u{fffd}".into()));
        }
        if batch.is_empty() {
            return Ok(0);
        }
        let share = batch.len().div_ceil(workers.len());
        let answers: Vec<Answers> = std::thread::scope(|scope| {
            let threads: Vec<_> = workers
                .iter_mut()
                .zip(batch.chunks(share))
                .map(|(worker, part)| scope.spawn(move || worker.answer(part)))
                .collect();
            threads.into_iter().map(|t| t.join().expect("a worker does not panic")).collect()
        });
        for a in answers {
            out.write_all(&a.text)?;
            if let Some((offset, why)) = a.malformed {
                out.flush()?;
                eprintln!("bivisor: line {}: {why}", number + offset + 1);
                return Ok(2);
            }
            number += a.lines;
        }
        out.flush()?;
    }
}

struct Answers {
    text: Vec<u8>,
    lines: usize,
    malformed: Option<(usize, String)>,
}

/// One thread's engines and memory.
struct Worker {
    backend: Backend,
    cpu: String,
    engines: HashMap<String, Result<Box<dyn Vcpu + Send>, String>>,
    world: World,
    /// Delivers exceptions for every engine.
    monitor: Core,
}

impl Worker {
    fn new(args: &ExecArgs, backend: Backend) -> Result<Worker> {
        let world = World::new().map_err(anyhow::Error::msg)?;
        let monitor = Core::default();
        let mut worker = Worker { backend, cpu: args.cpu.clone(), engines: HashMap::new(), world, monitor };
        if let Err(why) = worker.engine(&args.cpu) {
            anyhow::bail!("{why}");
        }
        Ok(worker)
    }

    fn engine(&mut self, cpu: &str) -> Result<&mut Box<dyn Vcpu + Send>, String> {
        let backend = self.backend;
        let made = self.engines.entry(cpu.to_owned()).or_insert_with(|| {
            let model = CpuModel::from_name(cpu)?;
            engine::for_code(backend, Arc::new(model))
        });
        made.as_mut().map_err(|why| why.clone())
    }

    fn answer(&mut self, lines: &[String]) -> Answers {
        let mut answers = Answers { text: Vec::new(), lines: 0, malformed: None };
        for (offset, line) in lines.iter().enumerate() {
            answers.lines += 1;
            if line.trim().is_empty() {
                continue;
            }
            let outcome = serde_json::from_str(line).map_err(|e| e.to_string()).and_then(|r| self.case(r));
            match outcome {
                Ok(response) => {
                    serde_json::to_writer(&mut answers.text, &response).expect("responses are plain data");
                    answers.text.push(b'\n');
                }
                Err(why) => {
                    answers.malformed = Some((offset, why));
                    break;
                }
            }
        }
        answers
    }

    /// Runs one case. `Err` is malformed input.
    fn case(&mut self, r: Request) -> Result<Response, String> {
        let mut state = setup::state(&r)?;
        let cpu = r.cpu.clone().unwrap_or_else(|| self.cpu.clone());
        if let Err(why) = self.engine(&cpu) {
            return Ok(Response::bare(r.id, Stop::Unsupported, Some(why)));
        }
        if let Err(refusal) = self.world.set_up(&r, &mut state) {
            self.world.finish(&[], false);
            return match refusal {
                Refusal::Malformed(why) => Err(why),
                Refusal::NotHere(why) => Ok(Response::bare(r.id, Stop::Unsupported, Some(why))),
            };
        }
        let engine = self.engines.get_mut(&cpu).and_then(|e| e.as_mut().ok()).expect("made above");
        *engine.state() = state;
        let calls = match r.memory {
            Model::Ram => Intercepts::empty(),
            // A process has no kernel below it that they could enter.
            Model::Flat => Intercepts::SYSCALL | Intercepts::SYSENTER,
        };
        engine.set_intercepts(Intercepts::EXCEPTIONS | calls);
        let (stop, insns, exception) = run_case(engine.as_mut(), &mut self.monitor, &mut self.world, &r);
        let (names, ranges) = wanted(&r.want)?;
        let want = |name: &str| names.iter().any(|n| n == name);
        let s = engine.state();
        let mut response = Response::bare(r.id, stop, None);
        response.insns = insns;
        response.exception = exception;
        response.regs = want("regs").then(|| response::regs(s));
        response.segs = want("segs").then(|| response::segs(s));
        response.sys = want("sys").then(|| response::sys(s));
        response.fpu = want("fpu").then(|| response::fpu(s));
        response.vec = want("vec").then(|| response::vec(s));
        let io = self.world.ports.take();
        response.io = want("io").then_some(io);
        let (delta, asked) = self.world.finish(&ranges, want("memdelta"));
        response.memdelta = want("memdelta").then_some(delta);
        response.mem = (!ranges.is_empty()).then_some(asked);
        Ok(response)
    }
}

/// Names and memory ranges asked for; without `want`, all but `sys`.
fn wanted(want: &Option<Want>) -> Result<(Vec<String>, Vec<Range>), String> {
    const NAMES: [&str; 7] = ["regs", "segs", "sys", "fpu", "vec", "memdelta", "io"];
    let (names, ranges) = match want {
        None => (NAMES.iter().filter(|n| **n != "sys").map(|n| n.to_string()).collect(), vec![]),
        Some(Want::Names(names)) => (names.clone(), vec![]),
        Some(Want::Ranges { mem }) => (vec![], mem.clone()),
        Some(Want::Both(items)) => {
            let mut out = (vec![], vec![]);
            for item in items {
                match item {
                    WantItem::Name(n) => out.0.push(n.clone()),
                    WantItem::Ranges { mem } => out.1.extend(mem.iter().cloned()),
                }
            }
            out
        }
    };
    match names.iter().find(|n| !NAMES.contains(&n.as_str())) {
        Some(n) => Err(format!("want: `{n}` is none of {}", NAMES.join(", "))),
        None => Ok((names, ranges)),
    }
}

fn run_case(vcpu: &mut dyn Vcpu, monitor: &mut Core, world: &mut World, r: &Request) -> (Stop, u64, Option<Exception>) {
    let limit = r.stop.insns.unwrap_or(u64::MAX).min(r.max_insns);
    let on_limit = if r.stop.insns.is_some_and(|n| n <= r.max_insns) { Stop::Insns } else { Stop::Limit };
    let mut done = 0;
    let mut exception = None;
    loop {
        if done >= limit {
            return (on_limit, done, exception);
        }
        if r.stop.rip.is_some_and(|Num(rip)| vcpu.state().rip == rip) {
            return (Stop::Rip, done, exception);
        }
        let board = Board { mem: world.memory(), bus: &world.ports };
        // Stopping at an address goes one instruction at a time.
        let step = if r.stop.rip.is_some() { 1 } else { limit - done };
        let (exit, counted) = vcpu.run_stretch(board, step);
        let counts = vcpu.instructions().is_some();
        done += counted + u64::from(exit == Exit::Halt && !counts);
        match exit {
            Exit::Budget | Exit::Kicked => {}
            Exit::Halt => return (Stop::Hlt, done, exception),
            Exit::Shutdown => return (Stop::TripleFault, done, exception),
            Exit::Exception(fault) => {
                if let (Some(Unmapped::Ram), Fault::Pf { addr, code }) = (r.unmapped, fault)
                    && code & 1 == 0
                    && world.map_on_demand(addr)
                {
                    continue;
                }
                exception = Some(describe(fault));
                if !r.deliver {
                    return (Stop::Exception, done, exception);
                }
                let board = Board { mem: world.memory(), bus: &world.ports };
                match monitor.deliver(vcpu.state(), board, Event::Fault(fault)) {
                    Ok(()) => {}
                    Err(Exit::Shutdown) => return (Stop::TripleFault, done, exception),
                    Err(_) => return (Stop::Unsupported, done, exception),
                }
            }
            _ => return (Stop::Unsupported, done, exception),
        }
    }
}

fn describe(fault: Fault) -> Exception {
    Exception {
        vector: fault.vector(),
        error: fault.error_code().map(|c| Num(c.into())),
        cr2: match fault {
            Fault::Pf { addr, .. } => Some(Num(addr)),
            _ => None,
        },
    }
}

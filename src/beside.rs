//! The interpreter beside the engine of a process: `bivisor run --sentinel`, and the lockstep of `bivisor diff PROGRAM`.

use crate::engine::Backend;
use anyhow::{Context, Result, bail};
use bivisor_emulator::cpu::cpuid::CpuModel;
use bivisor_emulator::host::fork::exit_group;
use bivisor_emulator::interp::Interpreter;
use bivisor_emulator::linux::{LastWords, VcpuFactory};
use bivisor_kvm_backend::KvmVm;
use bivisor_testsuite::lockstep::engine::{BLOCK, Counts, Difference, Lockstep, Shared};
use bivisor_testsuite::lockstep::files::{self, write};
use bivisor_testsuite::lockstep::sentinel::Sentinel;
use bivisor_translator::{Cache, Translator};
use serde_json::json;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// `--lockstep GRAIN:DIR`: after what stretches is compared, and where is told what came out.
#[derive(Clone, Debug)]
pub struct Beside {
    /// Instructions of a stretch, at most.
    most: usize,
    dir: PathBuf,
    text: String,
}

impl Beside {
    /// As the option has it.
    pub fn parse(text: &str) -> Result<Beside, String> {
        let (grain, dir) = text.split_once(':').ok_or("GRAIN:DIR")?;
        let most = match grain {
            "block" => BLOCK,
            "insn" => 1,
            _ => return Err(format!("{grain} is neither block nor insn")),
        };
        Ok(Beside { most, dir: dir.into(), text: text.into() })
    }

    /// For the next program of an exec.
    pub fn text(&self) -> &str {
        &self.text
    }
}

/// `1/N`.
pub fn one_in(text: &str) -> Result<u64, String> {
    let n = text.strip_prefix("1/").and_then(|n| n.parse().ok()).filter(|n| *n > 0);
    n.ok_or_else(|| "1/N, as in 1/1000".into())
}

fn counts(c: &Counts) -> serde_json::Value {
    let of = |n: &std::sync::atomic::AtomicU64| n.load(Ordering::Relaxed);
    json!({
        "stretches": of(&c.stretches), "instructions": of(&c.instructions), "clock": of(&c.apart[0]), "random": of(&c.apart[1]),
        "shared": of(&c.apart[2]), "large": of(&c.apart[3]), "interrupted": of(&c.interrupted),
    })
}

/// The factory of a process in lockstep: at the first difference it ends with status 1, and the request is in the directory. What is
/// to be done at its end.
///
/// # Errors
/// The engine is not to be had.
pub fn lockstep(backend: Backend, model: &Arc<CpuModel>, beside: &Beside) -> Result<(VcpuFactory, LastWords)> {
    let name = backend.name();
    let dir = beside.dir.clone();
    let report = move |d: &Difference| {
        let path = dir.join(format!("{}.json", std::process::id()));
        let _ = write(&path, &d.request(name).to_string());
        exit_group(1);
    };
    let shared = Shared::new(model.clone(), Box::new(report));
    let (dir, told) = (beside.dir.clone(), shared.clone());
    let words = LastWords(Some(Arc::new(move || {
        let path = dir.join(format!("{}.sum", std::process::id()));
        let _ = write(&path, &counts(&told.counts).to_string());
        String::new()
    })));
    let (model, most) = (model.clone(), beside.most);
    let factory: VcpuFactory = match backend {
        Backend::Interp => {
            Arc::new(move || Ok(Box::new(Lockstep::new(Interpreter::new(model.clone()), shared.clone(), most)?)))
        }
        Backend::Bt => {
            let no_memory = |e| format!("no executable memory: {e}");
            let cache = Translator::new(model.clone()).map_err(no_memory).map_err(anyhow::Error::msg)?.cache().clone();
            Arc::new(move || Ok(Box::new(Lockstep::new(Translator::with_cache(cache.clone()), shared.clone(), most)?)))
        }
        Backend::Kvm => {
            let vm = KvmVm::new(model).map_err(anyhow::Error::msg)?;
            // It does one instruction at a time.
            Arc::new(move || Ok(Box::new(Lockstep::new(vm.vcpu(), shared.clone(), most)?)))
        }
        Backend::Auto | Backend::Trap => bail!("--lockstep: name the engine: interp, bt or kvm"),
    };
    Ok((factory, words))
}

/// The factory of a process on the translator, one block in `every` compared; differences are written to `dir` and said on standard
/// error.
///
/// # Errors
/// `dir` cannot be made.
pub fn sentinel(
    cache: &Arc<Cache>,
    model: &Arc<CpuModel>,
    every: u64,
    dir: &Path,
    log: Option<i32>,
) -> Result<VcpuFactory> {
    std::fs::create_dir_all(dir).with_context(|| dir.display().to_string())?;
    let dir = dir.canonicalize().with_context(|| dir.display().to_string())?;
    let shared = Shared::new(model.clone(), files::report(dir, move |text| say(log, text)));
    let cache = cache.clone();
    Ok(Arc::new(move || Ok(Box::new(Sentinel::new(Translator::with_cache(cache.clone()), shared.clone(), every)?))))
}

fn say(log: Option<i32>, text: &str) {
    let text = format!("{text}\n");
    let fd = log.unwrap_or(libc::STDERR_FILENO);
    let _ = bivisor_emulator::linux::host::host_call(
        libc::SYS_write as u64,
        [fd as u64, text.as_ptr() as u64, text.len() as u64, 0, 0, 0],
    );
}

//! `bivisor boot`: guests of our own print the same on each engine, and what cannot be booted is said in a line.

use bivisor_testsuite::guest::bzimage;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::OnceLock;

const ENGINES: [&str; 2] = ["interp", "bt"];

/// The engines for small guests: KVM too, be it a software one, where there is any.
fn engines() -> impl Iterator<Item = &'static str> {
    let probe = bivisor_kvm_backend::host();
    let there = probe.usable_for_process || probe.usable_for_machine;
    if !there {
        println!("SKIPPED on kvm: {}", probe.reason);
    }
    ENGINES.into_iter().chain(there.then_some("kvm"))
}

fn directory() -> PathBuf {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    let make = || {
        let dir = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("boot");
        std::fs::create_dir_all(&dir).expect("temporary directory");
        dir
    };
    MADE.get_or_init(make).clone()
}

fn file(name: &str, bytes: &[u8]) -> String {
    let path = directory().join(name);
    std::fs::write(&path, bytes).expect("written");
    path.to_str().expect("plain path").to_owned()
}

fn boot(args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_bivisor"));
    command.arg("boot").args(args).args(["--timeout", "60"]).stdin(Stdio::null());
    command.output().expect("bivisor starts")
}

/// As [`boot`]; on KVM with the board's interrupt controllers and with the kernel's.
fn boot_each(args: &[&str]) -> Vec<Output> {
    let switches: &[&[&str]] = match args.contains(&"kvm") {
        true => &[&["--kernel-irqchip", "off"], &["--kernel-irqchip", "on"]],
        false => &[&[]],
    };
    switches.iter().map(|more| boot(&[args, more].concat())).collect()
}

/// Assembles a guest of testsuite/guests; a compiler is what the README asks for.
fn assemble(name: &str, flags: &[&str]) -> String {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("testsuite/guests").join(name);
    let out = directory().join(format!("{name}.{}", flags.len()));
    let cc = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    let common = ["-nostdlib", "-static", "-no-pie", "-Wl,-N", "-Wl,--build-id=none"];
    let done =
        Command::new(&cc).args(common).args(flags).arg("-o").arg(&out).arg(&source).output().expect("a C compiler");
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    out.to_str().expect("plain path").to_owned()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

const MACHINE: &str = "multiboot in protected mode: two words\nfive ticks of the 8254\nlong mode\nfive ticks of the local APIC\n\
    page tables edited\ncode changed itself\n";

#[test]
fn a_kernel_goes_through_the_modes_and_turns_the_machine_off() {
    let first = assemble("machine.S", &["-Wl,-Ttext=0x100000"]);
    let second = assemble("machine.S", &["-Wl,-Ttext=0x100000", "-Wa,--defsym,MULTIBOOT2=1", "-s"]);
    for engine in engines() {
        for (kernel, time) in [(&first, &[][..]), (&first, &["--deterministic"]), (&second, &[])] {
            if engine == "kvm" && !time.is_empty() {
                continue;
            }
            let args = ["--backend", engine, "--kernel", kernel, "--append", "two words", "--debug-exit", "0xf4"];
            for output in boot_each(&[&args[..], time].concat()) {
                assert_eq!(text(&output.stdout), MACHINE, "{engine} {time:?}: {}", text(&output.stderr));
                assert_eq!(output.status.code(), Some(0), "{engine} {time:?}");
            }
        }
    }
}

/// The state at the end, time-stamp counter and all, is the same in every run.
#[test]
fn counted_time_repeats() {
    let kernel = assemble("machine.S", &["-Wl,-Ttext=0x100000", "-Wl,--defsym=unused=0"]);
    let run = |name: &str| {
        let state = directory().join(name);
        let state = state.to_str().expect("plain path");
        let args = ["--backend", "interp", "--deterministic", "--kernel", &kernel, "--append", "x"];
        let output = boot(&[&args[..], &["--dump-state", state]].concat());
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        std::fs::read_to_string(state).expect("dumped")
    };
    let first = run("first.json");
    assert!(first.contains("\"rip\""));
    assert_eq!(first, run("second.json"));
}

#[test]
fn a_real_mode_program_ends_with_its_status() {
    let program = assemble("sector.S", &["-m32", "-Wl,-Ttext=0x7c00", "-Wl,--oformat=binary"]);
    for engine in engines() {
        let flat = format!("{program}@0x7c00");
        for output in boot_each(&["--backend", engine, "--flat", &flat, "--debug-exit", "0xf4"]) {
            assert_eq!(text(&output.stdout), "real mode\nthree ticks\n", "{engine}: {}", text(&output.stderr));
            assert_eq!(output.status.code(), Some(21 << 1 | 1), "{engine}");
        }
    }
}

/// With CR0.NE clear, as DOS has it.
#[test]
fn x87_exceptions_as_interrupt_13() {
    let program = assemble("ferr.S", &["-m32", "-Wl,-Ttext=0x7c00", "-Wl,--oformat=binary"]);
    for engine in ENGINES {
        for time in [&[][..], &["--deterministic"]] {
            let flat = format!("{program}@0x7c00");
            let args = ["--backend", engine, "--flat", &flat, "--debug-exit", "0xf4", "--debugcon", "0xe9=stdio"];
            let output = boot(&[&args[..], &["--serial", "none"], time].concat());
            let said = (text(&output.stdout), output.status.code());
            assert_eq!(said, ("EKEKIK".into(), Some(5)), "{engine} {time:?}: {}", text(&output.stderr));
        }
    }
}

/// A program of real mode writes to the text screen, waits for a key and writes its scan code as a character: Q is 0x10, shown as ►.
#[test]
fn the_text_screen_is_shown_and_the_keyboard_is_read() {
    // mov ax, b800; mov es, ax; mov es:[0], 'H' on blue; wait for port 64 bit 0; in al, 60; mov es:[2], al; out f4, al
    let program = [
        &[0xb8, 0, 0xb8, 0x8e, 0xc0, 0x26, 0xc7, 6, 0, 0, b'H', 0x1f][..],
        &[0xe4, 0x64, 0xa8, 1, 0x74, 0xfa, 0xe4, 0x60, 0x26, 0xa2, 2, 0, 0xe6, 0xf4],
    ];
    let flat = format!("{}@0x7c00", file("screen", &program.concat()));
    let in_kernel = engines().any(|engine| engine == "kvm").then_some(("kvm", &["--kernel-irqchip", "on"][..]));
    for (engine, more) in engines().map(|engine| (engine, &[][..])).chain(in_kernel) {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bivisor"));
        command.args(["boot", "--backend", engine, "--flat", &flat, "--display", "text", "--debug-exit", "0xf4"]);
        command.args(more);
        command.args(["--timeout", "60"]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("bivisor starts");
        child.stdin.take().expect("piped").write_all(b"q").expect("written");
        let output = child.wait_with_output().expect("ended");
        let last = text(&output.stdout).lines().last().unwrap_or_default().to_owned();
        assert_eq!((last.as_str(), output.status.code()), ("H►", Some(0x21)), "{engine}");
    }
}

/// By PIO from a disk on IDE, to it, and from a CD by packets.
#[test]
fn disks_and_cds_on_ide() {
    let program = assemble("ide.S", &["-m32", "-Wl,-Ttext=0x7c00", "-Wl,--oformat=binary"]);
    let mut cd = vec![0; 3 * 2048];
    cd[2048..2058].copy_from_slice(b"on the CD\n");
    let cd = file("ide.iso", &cd);
    for engine in engines() {
        let mut disk = vec![0; 8 * 512];
        disk[512..524].copy_from_slice(b"on the disk\n");
        let image = file(&format!("ide-{engine}.img"), &disk);
        let drive = format!("file={image},format=raw,if=ide");
        let flat = format!("{program}@0x7c00");
        let args =
            ["--backend", engine, "--flat", &flat, "--drive", &drive, "--cdrom", &cd, "--debugcon", "0xe9=stdio"];
        for output in boot_each(&[&args[..], &["--debug-exit", "0xf4", "--serial", "none"]].concat()) {
            let said = (text(&output.stdout), output.status.code());
            assert_eq!(said, ("on the disk\non the CD\n".into(), Some(3)), "{engine}: {}", text(&output.stderr));
        }
        let mut expected = disk.clone();
        expected.copy_within(512..1024, 1024);
        expected[1024..1536].reverse();
        assert!(std::fs::read(&image).expect("there") == expected, "{engine}: the sector was not written backwards");
    }
    fails(&["--flat", "/dev/null@0x7c00", "--cdrom", "/nowhere"], 1, &["--cdrom", "/nowhere", "No such file"]);
    let five = format!("file={cd},format=raw,if=ide,readonly=on");
    let five = ["--drive", &five, "--drive", &five, "--drive", &five, "--drive", &five, "--drive", &five];
    fails(&[&["--flat", "/dev/null@0x7c00"][..], &five].concat(), 1, &["four drives"]);
}

/// The kernel of the tests reads ports and halts: hardware would have left the guest for reasons 30 and 12.
#[test]
fn statistics_in_words_and_as_json() {
    let kernel =
        assemble("machine.S", &["-Wl,-Ttext=0x100000", "-s", "-Wl,--defsym=unused=1", "-Wl,-z,noseparate-code"]);
    for engine in engines() {
        let output = boot(&["--backend", engine, "--kernel", &kernel, "--append", "x", "--stats=json"]);
        // Of a software KVM a line comes before.
        let said = text(&output.stderr);
        let value: serde_json::Value = serde_json::from_str(said.lines().last().expect("a line")).expect("one object");
        assert_eq!(value["engine"], engine);
        let times = |list: &str, what: &str| {
            let rows = value[list].as_array().expect("rows");
            let row = rows.iter().find(|r| r["what"].as_str().is_some_and(|w| w.contains(what)));
            row.map(|r| (r["vtx_reason"].as_u64(), r["vtx_name"].clone(), r["times"].as_u64().expect("a number")))
        };
        let (reason, name, outs) = times("board", "OUT").expect("writes to the serial port");
        assert!(reason == Some(30) && name == "I/O instruction" && outs > 100, "{engine}: {reason:?} {name} {outs}");
        let (reason, _, taken) = times("board", "interrupt").expect("ticks");
        assert!(reason == Some(1) && taken >= 10, "{engine}: {taken}");
        let seconds = |what: &str| value["seconds"][what].as_f64().expect("a number");
        assert!(seconds("wall") >= seconds("halted") && seconds("guest") > 0.0);
        let number = |list: &str, what: &str| {
            let row = value[list].as_array()?.iter().find(|r| r["what"].as_str().is_some_and(|w| w.contains(what)))?;
            Some((row["kvm_reason"].as_u64()?, row["kvm_name"].as_str()?.to_owned()))
        };
        assert_eq!(number("board", "OUT"), Some((2, "KVM_EXIT_IO".into())), "{engine}");
        // What it cost adds up to less than it took in all.
        let costs = value["costs"].as_array().expect("rows");
        let spent = |place: &str| {
            let rows = costs.iter().filter(|c| c["where"] == place);
            rows.map(|c| (c["times"].as_u64().expect("a number"), c["nanoseconds"].as_u64().expect("a number")))
                .fold((0, 0), |(a, b), (times, ns)| (a + times, b + ns))
        };
        let limit = (seconds("wall") * 1e9) as u64;
        let ((on_board, ns), (out, outside)) = (spent("board"), spent(engine));
        assert!(on_board > 100 && ns > 1000 && ns < limit, "{engine}: {costs:?}");
        assert!((out > 20) == (engine != "interp") && outside < limit, "{engine}: {costs:?}");
        let (hits, misses) = (value["tlb"]["hits"].as_u64(), value["tlb"]["misses"].as_u64());
        assert_eq!((hits.is_some(), misses.is_some()), (engine != "kvm", engine != "kvm"), "{engine}");
        assert!(misses.is_none_or(|n| n > 3) && hits.is_none_or(|n| n > 10), "{engine}: {hits:?} {misses:?}");
        if engine == "kvm" {
            assert_eq!(number("left", "HLT"), Some((5, "KVM_EXIT_HLT".into())), "{}", value["left"]);
        }
        if engine == "bt" {
            assert!(value["translated"]["blocks"].as_u64().expect("a number") > 20);
            assert_eq!(times("left", "HLT").and_then(|t| t.0), Some(12), "{}", value["left"]);
        }
    }
    let output = boot(&["--kernel", &kernel, "--append", "x", "--stats"]);
    let said = text(&output.stderr);
    assert!(
        said.contains("OUT  [30 I/O instruction; KVM_EXIT_IO 2]")
            && said.contains("board: OUT, ")
            && said.contains("s of processor time"),
        "{said}"
    );
}

/// A BIOS begins at F000:FFF0 of its image: here with OUT 0xE9, a far jump, and an end.
#[test]
fn a_bios_starts_at_the_reset_vector() {
    for size in [0x1_0000, 0x4_0000] {
        let mut rom = vec![0xf4; size];
        // mov al, 'R'; out 0xe9, al; jmp f000:0100
        rom[size - 16..size - 7].copy_from_slice(&[0xb0, b'R', 0xe6, 0xe9, 0xea, 0, 1, 0, 0xf0]);
        // mov al, 'L'; out 0xe9, al; mov al, 3; out 0xf4, al
        rom[size - 0xff00..size - 0xff00 + 8].copy_from_slice(&[0xb0, b'L', 0xe6, 0xe9, 0xb0, 3, 0xe6, 0xf4]);
        let bios = file(&format!("bios{size}"), &rom);
        let output = boot(&["--bios", &bios, "--debugcon", "0xe9=stdio", "--debug-exit", "0xf4", "--serial", "none"]);
        assert_eq!((text(&output.stdout).as_str(), output.status.code()), ("RL", Some(7)), "{}", text(&output.stderr));
    }
}

/// What is stored to ROM is lost, as on any PC: by MOV, by a locked increment, by PUSH and by STOS.
#[test]
fn stores_to_rom_are_lost() {
    let mut rom = vec![0xf4; 0x1_0000];
    rom[0x100..0x104].copy_from_slice(b"ROM!");
    // CS begins at FFFF0000 until it is loaded. mov byte cs:[100], 55; lock inc word cs:[101]; jmp ff80
    rom[0xfff0..0xfffe].copy_from_slice(&[0x2e, 0xc6, 6, 0, 1, 0x55, 0xf0, 0x2e, 0xff, 6, 1, 1, 0xeb, 0x82]);
    let rest = [
        // mov edx, FFFF0000 by which unreal mode reaches the image through DS: lgdt cs:[ff60]; mov eax, cr0; or al, 1; mov cr0, eax
        &[0x2e, 0x66, 0x0f, 0x01, 0x16, 0x60, 0xff, 0x0f, 0x20, 0xc0, 0x0c, 1, 0x0f, 0x22, 0xc0][..],
        // mov ax, 8; mov ds, ax; mov es, ax; mov ss, ax; mov eax, cr0; and al, FE; mov cr0, eax
        &[0xb8, 8, 0, 0x8e, 0xd8, 0x8e, 0xc0, 0x8e, 0xd0, 0x0f, 0x20, 0xc0, 0x24, 0xfe, 0x0f, 0x22, 0xc0],
        // mov edi, FFFF0100; cld; addr32 stosd; mov esi, FFFF0100; mov ecx, 4
        &[0x66, 0xbf, 0, 1, 0xff, 0xff, 0xfc, 0x67, 0x66, 0xab, 0x66, 0xbe, 0, 1, 0xff, 0xff, 0x66, 0xb9, 4, 0, 0, 0],
        // addr32 lodsb; out e9, al; addr32 loop; mov al, 7; out f4, al
        &[0x67, 0xac, 0xe6, 0xe9, 0x67, 0xe2, 0xf9, 0xb0, 7, 0xe6, 0xf4],
    ]
    .concat();
    rom[0xff80..0xff80 + rest.len()].copy_from_slice(&rest);
    // Null, and data of 4 GiB from 0; limit and base of the table.
    rom[0xff48..0xff50].copy_from_slice(&0x00cf_9300_0000_ffffu64.to_le_bytes());
    rom[0xff60..0xff66].copy_from_slice(&[15, 0, 0x40, 0xff, 0xff, 0xff]);
    let bios = file("bios-rom", &rom);
    for engine in ENGINES {
        let args = ["--backend", engine, "--bios", &bios, "--debugcon", "0xe9=stdio", "--serial", "none"];
        let output = boot(&[&args[..], &["--debug-exit", "0xf4"]].concat());
        let said = (text(&output.stdout), output.status.code());
        assert_eq!(said, ("ROM!".into(), Some(15)), "{engine}: {}", text(&output.stderr));
    }
}

/// The kernel's interrupt controllers: the local APIC's ticks need no exit to the monitor; and what cannot be had is said in a line.
#[test]
fn interrupts_are_the_kernels_if_that_is_asked_for() {
    let kernel = assemble("machine.S", &["-Wl,-Ttext=0x100000"]);
    fails(&["--kernel", &kernel, "--kernel-irqchip", "on"], 1, &["--kernel-irqchip is about KVM", "--backend kvm"]);
    if !engines().any(|engine| engine == "kvm") {
        return;
    }
    let args = ["--backend", "kvm", "--kernel", &kernel, "--append", "x", "--stats=json"];
    let [board, kernels] = ["off", "on"].map(|switch| {
        let output = boot(&[&args[..], &["--kernel-irqchip", switch]].concat());
        let said = text(&output.stderr);
        let value: serde_json::Value = serde_json::from_str(said.lines().last().expect("a line")).expect("one object");
        let rows = value["board"].as_array().expect("rows").clone();
        let times = |what: &str| {
            let row = rows.iter().find(|r| r["what"].as_str().is_some_and(|w| w.contains(what)));
            row.map_or(0, |r| r["times"].as_u64().expect("a number"))
        };
        (times("store to an address"), times("interrupt taken"), value["seconds"]["halted"].clone())
    });
    // mov edi, 0xfee00080; popcnt eax, [edi], which KVM's emulator has not; hlt
    let program = file("stray", &[0xbf, 0x80, 0, 0xe0, 0xfe, 0xf3, 0x0f, 0xb8, 0x07, 0xf4]);
    let flat = format!("{program}@0x7c00");
    let output = boot(&["--backend", "kvm", "--kernel-irqchip", "on", "--mode", "prot", "--flat", &flat]);
    let said = text(&output.stderr);
    assert!(said.contains("accesses a controller") && said.contains("use --kernel-irqchip off"), "{said}");
    assert!(board.0 >= 10 && board.1 >= 10 && board.2.is_number(), "{board:?}");
    assert_eq!(kernels, (0, 0, serde_json::Value::Null));
}

/// Where KVM is software an operating system would take hours: it is not tried, and the line says what to do.
#[test]
fn a_software_kvm_is_no_place_for_linux() {
    let probe = bivisor_kvm_backend::host();
    if probe.usable_for_machine || !probe.usable_for_process {
        println!("SKIPPED: {}", probe.reason);
        return;
    }
    let kernel = file("bzImage", &bzimage(1024, &[]));
    let output = boot(&["--backend", "kvm", "--kernel", &kernel]);
    let said = text(&output.stderr);
    assert_eq!((output.status.code(), said.lines().count()), (Some(1), 1), "{said}");
    assert!(said.contains("KVM here is a software module") && said.contains("--backend bt"), "{said}");
}

/// Status and words of the one line that is printed.
fn fails(args: &[&str], status: i32, words: &[&str]) {
    for engine in ENGINES {
        let output = boot(&[args, &["--backend", engine]].concat());
        let stderr = text(&output.stderr);
        assert_eq!(output.status.code(), Some(status), "{args:?}: {stderr}");
        assert_eq!(stderr.lines().count(), 1, "{args:?}: {stderr}");
        for word in words {
            assert!(stderr.contains(word), "{args:?}: no `{word}` in: {stderr}");
        }
        assert!(!stderr.contains("panicked"), "{stderr}");
    }
}

#[test]
fn bad_input_is_said_in_a_line() {
    let kernel = assemble("machine.S", &["-Wl,-Ttext=0x100000", "-s"]);
    let whole = std::fs::read(&kernel).expect("assembled");
    let text = file("text", b"this is no kernel, whatever its name says\n");
    fails(&["--kernel", &text], 1, &["text", "not a kernel image"]);
    let cut = file("cut", &whole[..0x180]);
    fails(&["--kernel", &cut], 1, &["cut"]);
    // An ELF file of which a segment is not there.
    let flags =
        ["-Wl,-Ttext=0x1000000", "-Wa,--defsym,LONG=1", "-Wl,--defsym=unused=1", "-s", "-Wl,-z,noseparate-code"];
    let mut elf =
        std::fs::read(assemble("loaded.S", &[&flags[..], &["-Wl,--defsym=unused=2"]].concat())).expect("made");
    // p_filesz of the first segment.
    elf[0x60..0x68].copy_from_slice(&0x10_0000u64.to_le_bytes());
    fails(&["--kernel", &file("cut-elf", &elf)], 1, &["cut-elf", "a segment lies outside the file"]);
    fails(&["--kernel", env!("CARGO_BIN_EXE_bivisor")], 1, &["a program for Linux", "bivisor run"]);
    fails(&["--kernel", "/nowhere/vmlinuz"], 1, &["/nowhere/vmlinuz", "No such file"]);
    fails(&["--kernel", &kernel, "--initrd", "/"], 1, &["--initrd", "directory"]);
    let large = file("large", &vec![0; 17 << 20]);
    fails(&["--kernel", &kernel, "--initrd", &large, "--memory", "16"], 1, &["does not fit", "16 MiB"]);
    fails(&["--kernel", &kernel, "--memory", "100G"], 1, &["memory", "65536 MiB"]);
    fails(&["--kernel", &kernel, "--smp", "2"], 1, &["--smp 2"]);
    fails(&["--kernel", &kernel, "--display", "text", "--serial", "stdio"], 1, &["both want the terminal"]);
    let drive = |words: &str, expected: &[&str]| fails(&["--kernel", &kernel, "--drive", words], 1, expected);
    drive("file=/nowhere/disk.img", &["--drive /nowhere/disk.img", "No such file"]);
    drive("file=/", &["Is a directory"]);
    drive(&format!("file={text},format=qcow2,readonly=on"), &["text", "not a qcow2 image"]);
    let header = [&b"QFI\xfb\0\0\0\x03"[..], &[0; 40]].concat();
    drive(&format!("file={}", file("cut.qcow2", &header)), &["cut.qcow2", "truncated"]);
    drive(&format!("file={}", file("empty", b"")), &["is empty"]);
    fails(&["--kernel", &kernel, "--balloon", "512"], 1, &["--balloon", "512 MiB"]);
    let bios = file("bios", &vec![0; 0x1_0000]);
    fails(&["--bios", &bios, "--option-rom", &text], 1, &["--option-rom", "55 AA"]);
    fails(&["--bios", &text], 1, &["64, 128 or 256 KiB"]);
    fails(&["--flat", &format!("{text}@0x7c01234")], 1, &["real mode cannot start"]);
    fails(&["--kernel", &kernel, "--serial", "carrier-pigeon"], 1, &["stdio, none, file:PATH, pty"]);
}

/// A bzImage header with nothing behind it, or with lengths that lie.
#[test]
fn damaged_kernels_are_said_in_a_line() {
    let mut image = vec![0; 0x400];
    image[0x1f1] = 1;
    image[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    image[0x200..0x208].copy_from_slice(&[0xeb, 0x6a, b'H', b'd', b'r', b'S', 0x0f, 2]);
    image[0x211] = 1;
    fails(&["--kernel", &file("bz-cut", &image)], 1, &["cut off"]);
    fails(&["--kernel", &file("bz-header", &image[..0x210])], 1, &["cut off in its header"]);
    image.resize(0x800, 0);
    // It says that it has 4096 bytes of code.
    image[0x1f5] = 1;
    fails(&["--kernel", &file("bz-part", &image)], 1, &["cut off: 1024 of 4096 bytes"]);
    image[0x1f5] = 0;
    image[0x260..0x264].copy_from_slice(&0x7000_0000u32.to_le_bytes());
    fails(&["--kernel", &file("bz-big", &image)], 1, &["needs 1793 MiB"]);
    image[0x206] = 1;
    fails(&["--kernel", &file("bz-old", &image)], 1, &["too old"]);
}

/// A bzImage that says `P` by its own entry, and `U` by that of the ELF file that it has packed inside.
#[test]
fn what_is_inside_a_kernel_is_unpacked() {
    // mov al, N; out e9, al; mov al, 3; out f4, al
    let says = |n: u8| [0xb0, n, 0xe6, 0xe9, 0xb0, 3, 0xe6, 0xf4];
    let mut elf = vec![0; 0x78];
    let mut put = |at: usize, v: u64, n: usize| elf[at..at + n].copy_from_slice(&v.to_le_bytes()[..n]);
    let header = [(0, 0x0001_0102_464c_457f, 8), (0x10, 2, 2), (0x12, 62, 2), (0x14, 1, 4), (0x18, 0x100_0000, 8)];
    let sizes = [(0x20, 64, 8), (0x34, 64, 2), (0x36, 56, 2), (0x38, 1, 2)];
    let segment = [(0x40, 1, 4), (0x48, 0x78, 8), (0x58, 0x100_0000, 8), (0x60, 8, 8), (0x68, 0x2000, 8)];
    header.into_iter().chain(sizes).chain(segment).for_each(|(at, v, n)| put(at, v, n));
    elf.extend(says(b'U'));
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    gzip.write_all(&elf).expect("memory");
    let packed = gzip.finish().expect("memory");
    let payload = [(0x248, 0x400, 4), (0x24c, packed.len() as u64, 4), (0x258, 0x100_0000, 8), (0x260, 0x10_0000, 4)];
    let mut image = bzimage(0x1000, &payload);
    image[0x600..0x608].copy_from_slice(&says(b'P'));
    image[0x800..0x800 + packed.len()].copy_from_slice(&packed);
    let whole = file("packed", &image);
    image[0x800 + packed.len() / 2] ^= 0x10;
    let damaged = file("packed-damaged", &image);
    for engine in ENGINES {
        for (kernel, option, expected) in
            [(&whole, None, "U"), (&whole, Some("--no-unpack"), "P"), (&damaged, None, "P")]
        {
            let args = ["--backend", engine, "--kernel", kernel, "--debugcon", "0xe9=stdio", "--debug-exit", "0xf4"];
            let output = boot(&[&args[..], &["--serial", "none"], option.as_slice()].concat());
            let said = (text(&output.stdout), output.status.code());
            assert_eq!(said, (expected.into(), Some(7)), "{engine} {option:?}: {}", text(&output.stderr));
        }
    }
}

/// The command line, the RAM disk, the ACPI root pointer and the memory map, by PVH, by a multiboot header's addresses, and as a vmlinux.
#[test]
fn each_way_to_start_a_kernel_hands_over_the_same() {
    let disk = file("ram-disk", b"a disk");
    let at_2_mib = ["-m32", "-Wl,-Ttext=0x200000"];
    let pvh = assemble("loaded.S", &[&at_2_mib[..], &["-Wa,--defsym,PVH=1"]].concat());
    let flat = ["-Wa,--defsym,ADDRESSES=1", "-Wl,--oformat=binary"];
    let multiboot = assemble("loaded.S", &[&at_2_mib[..], &flat].concat());
    let vmlinux = assemble("loaded.S", &["-Wl,-Ttext=0x1000000", "-Wa,--defsym,LONG=1"]);
    // Without a note an ELF file of 32 bits starts by the 32-bit protocol, whose parameters are the same.
    let short = ["-m32", "-Wl,-Ttext=0x1000000", "-Wa,--defsym,SHORT=1", "-Wl,--defsym=unused=0", "-s"];
    let short = assemble("loaded.S", &short);
    for engine in engines() {
        for (kernel, before, small) in [
            (&pvh, "", false),
            (&multiboot, &*format!("{multiboot} "), true),
            (&vmlinux, "", false),
            (&short, "", false),
        ] {
            // A software KVM gets no operating system.
            if engine == "kvm" && !small && !bivisor_kvm_backend::host().usable_for_machine {
                continue;
            }
            let args = ["--backend", engine, "--kernel", kernel, "--initrd", &disk, "--append", "two words"];
            let ports = ["--debugcon", "0xe9=stdio", "--serial", "none", "--debug-exit", "0xf4"];
            let output = boot(&[&args[..], &ports].concat());
            let said = (text(&output.stdout), output.status.code());
            let expected = format!("{before}two words\na disk\nRSD PTR \nM");
            assert_eq!(said, (expected, Some(11)), "{engine} {kernel}: {}", text(&output.stderr));
        }
    }
}

/// Sector 1 of a disk on IDE says what the program expects; sector 2 is not there yet and is made when it is written to.
#[test]
fn a_qcow2_disk_grows_and_a_snapshot_does_not() {
    let program = assemble("ide.S", &["-m32", "-Wl,-Ttext=0x7c00", "-Wl,--oformat=binary", "-Wl,--defsym=unused=0"]);
    let mut cd = vec![0; 3 * 2048];
    cd[2048..2058].copy_from_slice(b"on the CD\n");
    let cd = file("qcow2.iso", &cd);
    // Version 2 with clusters of 512 bytes: header, table of counts, counts, first and second table, and one cluster of data.
    let mut image = vec![0; 6 * 512];
    let mut put = |at: usize, v: u64, n: usize| image[at..at + n].copy_from_slice(&v.to_be_bytes()[8 - n..]);
    let header = [
        (0, 0x5146_49fb, 4),
        (4, 2, 4),
        (20, 9, 4),
        (24, 8 * 512, 8),
        (36, 1, 4),
        (40, 3 * 512, 8),
        (48, 512, 8),
        (56, 1, 4),
    ];
    header.into_iter().for_each(|(at, v, n)| put(at, v, n));
    put(512, 2 * 512, 8);
    (0..6).for_each(|cluster| put(2 * 512 + 2 * cluster, 1, 2));
    put(3 * 512, (1 << 63) + 4 * 512, 8);
    put(4 * 512 + 8, (1 << 63) + 5 * 512, 8);
    image[5 * 512..5 * 512 + 12].copy_from_slice(b"on the disk\n");
    for (engine, snapshot) in [("bt", false), ("interp", false), ("bt", true)] {
        let path = file(&format!("grows-{engine}-{snapshot}.qcow2"), &image);
        let drive = format!("file={path},format=qcow2,if=ide,snapshot={}", if snapshot { "on" } else { "off" });
        let (flat, said) = (format!("{program}@0x7c00"), directory().join(format!("said-{engine}-{snapshot}")));
        let to = format!("0xe9=file:{}", said.to_str().expect("plain path"));
        let args = ["--backend", engine, "--flat", &flat, "--drive", &drive, "--cdrom", &cd, "--debugcon", &to];
        let output = boot(&[&args[..], &["--debug-exit", "0xf4", "--serial", "none"]].concat());
        assert_eq!(output.status.code(), Some(3), "{engine}: {}", text(&output.stderr));
        assert_eq!(std::fs::read_to_string(said).expect("written"), "on the disk\non the CD\n", "{engine}");
        let after = std::fs::read(&path).expect("there");
        assert_eq!(after == image, snapshot, "{engine}: what is written to a snapshot stays in memory");
        if !snapshot {
            let entry = u64::from_be_bytes(after[4 * 512 + 16..4 * 512 + 24].try_into().expect("eight bytes"));
            let at = (entry & 0x00ff_ffff_ffff_fe00) as usize;
            let backwards: Vec<u8> = image[5 * 512..].iter().rev().copied().collect();
            assert!(at >= image.len() && after[at..at + 512] == backwards, "{engine}: entry {entry:#x}");
        }
    }
}

/// mov al, 'F'; mov dx, 3f8; out dx, al; out f4, al
#[test]
fn the_serial_port_in_a_file() {
    let program = file("to-file", &[0xb0, b'F', 0xba, 0xf8, 3, 0xee, 0xe6, 0xf4]);
    let said = directory().join("serial.txt");
    let (flat, to) = (format!("{program}@0x7c00"), format!("file:{}", said.to_str().expect("plain path")));
    let output = boot(&["--flat", &flat, "--serial", &to, "--debug-exit", "0xf4"]);
    assert_eq!((output.status.code(), output.stdout.len()), (Some(0x8d), 0), "{}", text(&output.stderr));
    assert_eq!(std::fs::read(said).expect("written"), b"F");
    fails(&["--flat", &flat, "--serial", "file:/nowhere/x"], 1, &["--serial", "/nowhere/x", "No such file"]);
}

/// mov eax, 40200; mov [fee00300], eax: an SMI to itself; mov al, 2; out f4, al
#[test]
fn system_management_interrupts_are_ignored_with_a_line() {
    let code = [0xb8, 0, 2, 4, 0, 0xa3, 0, 3, 0xe0, 0xfe, 0xb0, 2, 0xe6, 0xf4];
    let flat = format!("{}@0x10000", file("smi", &code));
    for engine in engines() {
        let output = boot(&["--backend", engine, "--mode", "prot", "--flat", &flat, "--debug-exit", "0xf4"]);
        assert_eq!(output.status.code(), Some(5), "{engine}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains("1 system-management interrupts were ignored"), "{engine}");
    }
    // What there is to start is asked for.
    let output = boot(&[]);
    let said = text(&output.stderr);
    assert_eq!(
        (output.status.code(), said.contains("--kernel <FILE>|--bios <FILE>|--flat")),
        (Some(2), true),
        "{said}"
    );
}

#[test]
fn a_triple_fault_says_where() {
    // lidt [zero]; ud2
    let program = file("triple", &[0x0f, 0x01, 0x1e, 0x10, 0x7c, 0x0f, 0x0b]);
    fails(&["--flat", &format!("{program}@0x7c00")], 122, &["triple fault", "0000:0x7c05"]);
    // ud2, without an IDT
    let program = file("triple-2", &[0x90, 0x0f, 0x0b]);
    for mode in ["prot", "long"] {
        fails(&["--flat", &format!("{program}@0x10000"), "--mode", mode], 122, &["triple fault", "0x10001"]);
    }
}

/// Bytes on the port 0xe9, and the status.
fn says(args: &[&str], program: &str, expected: &str, status: i32) {
    for engine in ENGINES {
        let flat = format!("{program}@0x10000");
        let common = ["--backend", engine, "--flat", &flat, "--debugcon", "0xe9=stdio", "--serial", "none"];
        let output = boot(&[&common[..], &["--debug-exit", "0xf4"], args].concat());
        let said = (text(&output.stdout), output.status.code());
        assert_eq!(said, (expected.into(), Some(status)), "{engine} {args:?}: {}", text(&output.stderr));
    }
}

/// The same bytes mean something else in each mode.
#[test]
fn flat_code_starts_in_the_mode_that_is_wanted() {
    // mov al, '0'; inc ax, inc eax or a REX prefix, and nop
    // add eax, 02040000; or add ax, 0 and add al, 2; out e9, al; mov al, 3; out f4, al
    let code = [0xb0, b'0', 0x40, 0x90, 0x66, 0x05, 0, 0, 0x04, 0x02, 0xe6, 0xe9, 0xb0, 3, 0xe6, 0xf4];
    let program = file("modes", &code);
    for (mode, expected) in [("real", "1"), ("prot", "3"), ("long", "2")] {
        says(&["--mode", mode], &program, expected, 7);
    }
}

#[test]
fn the_offered_cpu_is_the_one_named() {
    // mov eax, 1; cpuid; shr ecx, 23; mov al, cl; and al, 1; add al, '0'; out e9, al; mov al, 3; out f4, al: CPUID.POPCNT
    let code = [
        &[0xb8, 1, 0, 0, 0, 0x0f, 0xa2, 0xc1, 0xe9, 23][..],
        &[0x88, 0xc8, 0x24, 1, 0x04, b'0', 0xe6, 0xe9, 0xb0, 3, 0xe6, 0xf4],
    ]
    .concat();
    let program = file("cpuid", &code);
    says(&["--mode", "prot", "--cpu", "max"], &program, "1", 7);
    says(&["--mode", "prot", "--cpu", "max,-popcnt"], &program, "0", 7);
    fails(&["--flat", &format!("{program}@0x10000"), "--cpu", "pentium-9"], 1, &["pentium-9"]);
}

/// QEMU's pc-testdev keeps what is stored at 0xe0; fw_cfg says how many processors there are, and how much RAM.
#[test]
fn the_test_device_and_fw_cfg() {
    let code = [
        // mov al, 'T'; out e0, al; in al, e0; out e9, al
        &[0xb0, b'T', 0xe6, 0xe0, 0xe4, 0xe0, 0xe6, 0xe9][..],
        // mov dx, 510; mov ax, 5; out dx, ax; inc dx; in al, dx; add al, '0'; out e9, al
        &[0x66, 0xba, 0x10, 5, 0x66, 0xb8, 5, 0, 0x66, 0xef, 0x66, 0x42, 0xec, 0x04, b'0', 0xe6, 0xe9],
        // mov dx, 510; mov ax, 3; out dx, ax; inc dx; in al, dx four times: the fourth byte of 64 MiB is 4; add al, '0'; out e9, al
        &[
            0x66, 0xba, 0x10, 5, 0x66, 0xb8, 3, 0, 0x66, 0xef, 0x66, 0x42, 0xec, 0xec, 0xec, 0xec, 0x04, b'0', 0xe6,
            0xe9,
        ],
        &[0xb0, 3, 0xe6, 0xf4],
    ]
    .concat();
    let program = file("testdev", &code);
    says(&["--mode", "prot", "--testdev", "--memory", "64"], &program, "T14", 7);
}

/// A reset starts the machine again, or with --no-reboot ends it well.
#[test]
fn a_reset_starts_again_or_ends() {
    // mov al, 'x'; out e9, al; mov al, fe; out 64, al; cli; hlt
    let program = file("reset", &[0xb0, b'x', 0xe6, 0xe9, 0xb0, 0xfe, 0xe6, 0x64, 0xfa, 0xf4]);
    says(&["--no-reboot"], &program, "x", 0);
    for engine in ENGINES {
        let flat = format!("{program}@0x10000");
        let args = ["boot", "--backend", engine, "--flat", &flat, "--debugcon", "0xe9=stdio", "--serial", "none"];
        let mut command = Command::new(env!("CARGO_BIN_EXE_bivisor"));
        command.args(args).args(["--timeout", "1"]).stdin(Stdio::null());
        let output = command.output().expect("bivisor starts");
        assert_eq!(output.status.code(), Some(124), "{engine}: {}", text(&output.stderr));
        assert!(text(&output.stdout).starts_with("xx"), "{engine}: {}", text(&output.stdout));
    }
}

/// With interrupts off nothing in the guest ends a loop: the host's clock does.
#[test]
fn the_time_is_up_for_a_loop_with_interrupts_off() {
    let program = file("loop", &[0xfa, 0xeb, 0xfe]);
    for engine in ENGINES {
        let flat = format!("{program}@0x7c00");
        let mut command = Command::new(env!("CARGO_BIN_EXE_bivisor"));
        command.args(["boot", "--backend", engine, "--flat", &flat, "--timeout", "0.3"]).stdin(Stdio::null());
        let output = command.output().expect("bivisor starts");
        assert_eq!(output.status.code(), Some(124), "{engine}: {}", text(&output.stderr));
        assert!(text(&output.stderr).contains("the time is up"), "{engine}");
    }
}

//! Real programs give the same standard output, standard error and exit status as native, under every engine.
//!
//! Native is the oracle. A program that is not installed is skipped with its name; an engine this host cannot have, with the reason.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// One thing to run, in a directory of its own.
struct Case {
    name: &'static str,
    /// Programs it needs.
    needs: &'static [&'static str],
    argv: &'static [&'static str],
    /// Files made in the directory before it runs.
    files: &'static [(&'static str, &'static str)],
}

const fn case(name: &'static str, needs: &'static [&'static str], argv: &'static [&'static str]) -> Case {
    Case { name, needs, argv, files: &[] }
}

#[rustfmt::skip]
const CASES: &[Case] = &[
    case("true", &["true"], &["true"]),
    case("false", &["false"], &["false"]),
    case("ls", &["ls"], &["ls", "-lR", "/usr/share/doc/bash", "/etc/alternatives"]),
    case("ls of nothing", &["ls"], &["ls", "/nonexistent"]),
    case("cat", &["cat"], &["cat", "/proc/self/cmdline"]),
    case("busybox sh", &["busybox"], &["busybox", "sh", "-c",
        "for i in 1 2 3; do echo $i | busybox sed s/2/two/; done; busybox seq 5 | busybox awk '{s+=$1} END {print s}'; busybox ls /etc/alternatives | busybox wc -l"]),
    case("bash pipes", &["bash"], &["bash", "-c", "seq 1000 | grep 7 | sort -rn | head -5 | tr '\\n' ' '; echo ${PIPESTATUS[@]}"]),
    case("bash subshells", &["bash"], &["bash", "-c", "x=1; (x=2; echo $x; exit 3); echo $? $x; y=$(echo a; (echo b; echo c) | cat); echo \"$y\"; for i in {1..20}; do (exit $i) || echo -n $?,; done"]),
    case("bash traps", &["bash"], &["bash", "-c", "trap 'echo usr1' USR1; trap 'echo bye' EXIT; kill -USR1 $$; sleep 0.1 & wait $!; (trap 'echo term; exit 5' TERM; kill -TERM $BASHPID; sleep 1); echo $?; kill -9 $BASHPID"]),
    case("bash job control", &["bash"], &["bash", "-c", "set -m; sleep 30 & kill -STOP %1; kill -CONT %1; kill %1; wait %1; echo $?; (exit 4) & wait %%; echo $?"]),
    case("bash here-documents", &["bash"], &["bash", "-c", "cat <<E\na $((6*7))\nE\nread a b <<< 'x y'; echo $b; while read l; do echo \"<$l>\"; done < <(printf '1\\n2\\n'); printf '%s\\n' \"${BASH##*/}\""]),
    case("sh exit by signal", &["sh"], &["sh", "-c", "kill -SEGV $$"]),
    case("env", &["env"], &["env", "-i", "A=1", "sh", "-c", "echo $A$B"]),
    case("python json re hashlib", &["python3"], &["python3", "-c",
        "import json,re,hashlib,zlib,struct,math\nd={'a':[1,2.5,None,True],'b':{'c':'\\u00e9'}}\nprint(json.dumps(d,sort_keys=True),json.loads(json.dumps(d))==d)\nprint(re.sub(r'(\\w+)@(\\w+)',r'\\2 at \\1','joe@home, jim@work'))\nfor h in 'md5','sha1','sha256','sha512','blake2b': print(hashlib.new(h,b'x'*1000).hexdigest())\nprint(zlib.crc32(b'abc'*100),len(zlib.compress(b'abc'*1000)),struct.pack('<d',math.sin(1.5)).hex())"]),
    case("python threads", &["python3"], &["python3", "-c",
        "import threading,queue\nq=queue.Queue();r=[]\ndef w():\n  while (i:=q.get()) is not None: r.append(i*i)\nt=[threading.Thread(target=w) for _ in range(8)]\n[x.start() for x in t];[q.put(i) for i in range(200)];[q.put(None) for _ in t];[x.join() for x in t]\nprint(sum(r),len(r))"]),
    case("python subprocess", &["python3"], &["python3", "-c",
        "import subprocess,os,signal\nprint(subprocess.run(['sh','-c','cat; echo err >&2; exit 7'],input=b'hello',capture_output=True))\ntry: subprocess.run(['/nonexistent'])\nexcept OSError as e: print(e)\np=subprocess.Popen(['sleep','100']);p.terminate();print(p.wait()==-signal.SIGTERM)\nprint(os.popen('echo hi').read())"]),
    case("python multiprocessing", &["python3"], &["python3", "-c",
        "import multiprocessing as m\ndef f(x): return x*x\nif __name__=='__main__':\n  m.set_start_method('fork')\n  with m.Pool(4) as p: print(p.map(f,range(20)))"]),
    case("perl", &["perl"], &["perl", "-e", "my %h; $h{$_%7}+=$_ for 1..5000; print join(',',map{\"$_=$h{$_}\"} sort keys %h),\"\\n\"; $_='aXbXc'; s/X/-/g; print; printf \"%.10f\\n\", atan2(1,1)*4; my $p=fork; if(!$p){exit 9} waitpid $p,0; print $?>>8,\"\\n\"; $SIG{ALRM}=sub{print \"alarm\\n\"}; alarm 1; sleep 5; die \"end\\n\""]),
    case("awk", &["awk"], &["awk", "BEGIN{for(i=0;i<2000;i++){a[i%13]+=i*1.5} for(i=0;i<13;i++) printf \"%s \",a[i]; print length(\"abc\"), substr(\"hello\",2,3), sin(1), int(3.9); exit 3}"]),
    case("sed", &["sed"], &["sh", "-c", "seq 50 | sed -n '10,20{s/1/X/g;p}; $!{h;d}; x;G;p'"]),
    case("grep -P", &["grep"], &["sh", "-c", "printf 'foo123\\nbar\\nfoo45\\n' | grep -P 'foo(?=\\d{3})|^b(.)r$'; grep -c x /nonexistent"]),
    case("sort of 200k lines", &["sort"], &["sh", "-c", "seq 200000 | awk '{print ($1*7919)%200003}' | sort -n | md5sum; seq 5000 | sort -R --random-source=/etc/passwd | sort | md5sum"]),
    case("tar gzip bzip2 xz", &["tar", "gzip", "bzip2", "xz"], &["sh", "-c",
        "mkdir d; for i in $(seq 30); do seq $i 2000 > d/f$i; done; for c in z j J; do tar c${c}f a.tar --mtime=@0 --owner=0 --group=0 --sort=name d; tar x${c}f a.tar -O | md5sum; tar t${c}f a.tar | wc -l; done; gzip -9 < d/f1 | gzip -t && xz -9 < d/f2 | xz -dc | cmp - d/f2 && bzip2 < d/f3 | bunzip2 | cmp - d/f3 && echo same"]),
    case("sqlite3", &["sqlite3"], &["sqlite3", "t.db",
        "create table t(a integer primary key, b text, c real); with recursive n(i) as (select 1 union all select i+1 from n where i<2000) insert into t select i, 'row '||i, i*0.5 from n; create index x on t(b); select count(*), sum(c), max(b) from t; select * from t where b like 'row 19%' limit 5; begin; delete from t where a%3=0; rollback; select count(*) from t; pragma integrity_check;"]),
    Case { name: "gcc compile, link and run", needs: &["gcc"], argv: &["sh", "-c", "gcc -O2 -Wall p.c -o p -lm && ./p; echo $?"],
        files: &[("p.c", "#include <stdio.h>\n#include <stdlib.h>\n#include <math.h>\n#include <string.h>\nstatic int cmp(const void*a,const void*b){return *(const int*)a-*(const int*)b;}\nint main(void){int v[100];for(int i=0;i<100;i++)v[i]=(i*7919)%101;qsort(v,100,sizeof*v,cmp);double s=0;for(int i=0;i<100;i++)s+=sqrt(v[i]);char b[64];snprintf(b,64,\"%.6f %d %zu\",s,v[50],strlen(\"abc\"));puts(b);return 42;}\n")] },
    Case { name: "make", needs: &["make", "gcc"], argv: &["sh", "-c", "make -j2 2>&1 | sort; ./prog 3 4; make 2>&1; touch a.h; make -n"],
        files: &[("Makefile", "CFLAGS=-O1\nprog: main.o add.o\n\tcc -o $@ $^\nmain.o add.o: a.h\n"), ("a.h", "int add(int,int);\n"),
                 ("main.c", "#include \"a.h\"\n#include <stdio.h>\n#include <stdlib.h>\nint main(int c,char**v){if(c<3)return 1;printf(\"%d\\n\",add(atoi(v[1]),atoi(v[2])));return 0;}\n"),
                 ("add.c", "#include \"a.h\"\nint add(int a,int b){return a+b;}\n")] },
    Case { name: "static program", needs: &["gcc"], argv: &["sh", "-c", "gcc -O2 -static s.c -o s && ./s a b; echo $?"],
        files: &[("s.c", "#include <stdio.h>\n#include <stdlib.h>\n#include <time.h>\nint main(int c,char**v){struct timespec t;if(clock_gettime(CLOCK_MONOTONIC,&t))return 1;char*p=malloc(1<<20);for(int i=0;i<1<<20;i++)p[i]=i;long s=0;for(int i=0;i<1<<20;i++)s+=p[i];printf(\"%d %s %ld\\n\",c,v[c-1],s);free(p);return 5;}\n")] },
    Case { name: "8 threads and mutexes", needs: &["gcc"], argv: &["sh", "-c", "gcc -O2 t.c -o t -pthread && ./t"],
        files: &[("t.c", "#include <pthread.h>\n#include <stdio.h>\nstatic pthread_mutex_t m=PTHREAD_MUTEX_INITIALIZER;static pthread_cond_t c=PTHREAD_COND_INITIALIZER;static long n;static int done;static __thread int mine;\nstatic void*f(void*a){for(int i=0;i<20000;i++){pthread_mutex_lock(&m);n++;mine++;pthread_mutex_unlock(&m);__atomic_add_fetch(&done,1,__ATOMIC_RELAXED);}pthread_mutex_lock(&m);pthread_cond_signal(&c);pthread_mutex_unlock(&m);return (void*)(long)mine;}\nint main(void){pthread_t t[8];long s=0;for(int i=0;i<8;i++)pthread_create(t+i,0,f,0);for(int i=0;i<8;i++){void*r;pthread_join(t[i],&r);s+=(long)r;}printf(\"%ld %ld %d\\n\",n,s,done);return 0;}\n")] },
    Case { name: "signals", needs: &["gcc"], argv: &["sh", "-c", "gcc -O2 s.c -o s && ./s"],
        files: &[("s.c", "#define _GNU_SOURCE\n#include <signal.h>\n#include <stdio.h>\n#include <unistd.h>\n#include <sys/time.h>\n#include <errno.h>\n#include <string.h>\nstatic volatile sig_atomic_t n,alarms,segv;static void h(int s){n++;}static void al(int s){alarms++;}\n#include <setjmp.h>\nstatic sigjmp_buf jb;static void sg(int s,siginfo_t*i,void*u){segv++;siglongjmp(jb,i->si_addr==(void*)16?2:1);}\nint main(void){struct sigaction a;memset(&a,0,sizeof a);a.sa_handler=h;sigaction(SIGUSR1,&a,0);for(int i=0;i<5000;i++)raise(SIGUSR1);a.sa_handler=al;sigaction(SIGALRM,&a,0);struct itimerval t={{0,2000},{0,2000}};setitimer(ITIMER_REAL,&t,0);volatile double x=1;while(alarms<20)x=x*1.0000001;memset(&t,0,sizeof t);setitimer(ITIMER_REAL,&t,0);a.sa_flags=SA_SIGINFO;a.sa_sigaction=sg;sigaction(SIGSEGV,&a,0);int r=sigsetjmp(jb,1);if(!r)*(volatile int*)16=1;sigset_t s;sigemptyset(&s);sigaddset(&s,SIGUSR1);sigprocmask(SIG_BLOCK,&s,0);raise(SIGUSR1);sigset_t p;sigpending(&p);int pend=sigismember(&p,SIGUSR1);int before=n;sigprocmask(SIG_UNBLOCK,&s,0);printf(\"%d %d %d %d %d %d\\n\",n,alarms>=20,segv,r,pend,n-before);return 0;}\n")] },
    Case { name: "setjmp", needs: &["gcc"], argv: &["sh", "-c", "gcc -O2 j.c -o j && ./j"],
        files: &[("j.c", "#include <setjmp.h>\n#include <stdio.h>\nstatic jmp_buf b;static int d(int n){if(n==0)longjmp(b,7);return d(n-1)+1;}\nint main(void){int s=0;for(volatile int i=0;i<1000;i++){int r=setjmp(b);if(!r)d(50);s+=r;}printf(\"%d\\n\",s);return 0;}\n")] },
    Case { name: "C++ exceptions", needs: &["g++"], argv: &["sh", "-c", "g++ -O2 e.cc -o e && ./e"],
        files: &[("e.cc", "#include <iostream>\n#include <stdexcept>\n#include <string>\n#include <map>\nstruct D{static int n;~D(){n++;}};int D::n=0;static int f(int i){D d;if(i%3==0)throw std::runtime_error(\"r\"+std::to_string(i));if(i%3==1)throw i;return i;}\nint main(){std::map<std::string,int>m;int s=0;for(int i=0;i<3000;i++){try{s+=f(i);}catch(const std::exception&e){m[e.what()]++;}catch(int v){s-=v;}}std::cout<<m.size()<<' '<<s<<' '<<D::n<<std::endl;}\n")] },
    case("node", &["node"], &["node", "-e", "let s=0;for(let i=0;i<3e6;i++)s=(s*31+i)|0;console.log(s);const m=new Map();for(let i=0;i<5e4;i++)m.set('k'+i%977,i);console.log(m.size,[3,1,2].sort().join());setTimeout(()=>{console.log('t');process.exit(3)},5);"]),
    case("luajit", &["luajit"], &["luajit", "-e", "local s=0 for i=1,1e6 do s=(s*31+i)%1000003 end print(s) local t={} for i=1,1000 do t[i]=tostring(i*7%13) end table.sort(t) print(table.concat(t,'',1,40))"]),
    case("musl", &["musl-gcc"], &["sh", "-c", "printf '#include <stdio.h>\\nint main(int c,char**v){printf(\"%%d %%s\\\\n\",c,v[c-1]);return 3;}' > m.c && musl-gcc -static -O2 m.c -o m && ./m x y; echo $?"]),
    case("git", &["git"], &["sh", "-c", "export GIT_CONFIG_NOSYSTEM=1 HOME=$PWD GIT_AUTHOR_DATE='@1 +0000' GIT_COMMITTER_DATE='@1 +0000'; git init -q -b m . && git config user.name n && git config user.email e@x && for i in 1 2 3; do echo $i > f$i; git add -A; git commit -qm c$i; done; git log --stat; echo z >> f1; git status --short; git diff; git gc -q; git fsck"]),
];

const FILES_TEST: &str = env!("CARGO_MANIFEST_DIR");

fn on_path(program: &str) -> bool {
    std::env::var_os("PATH").is_some_and(|p| std::env::split_paths(&p).any(|d| d.join(program).is_file()))
}

#[derive(PartialEq)]
struct Outcome {
    stdout: Vec<u8>,
    stderr: Vec<u8>,
    status: ExitStatus,
}

/// Runs in a fresh directory, always of the same name, so that paths in the output agree.
fn run(command: &mut Command, c: &Case, dir: &Path) -> Result<Outcome, String> {
    let _ = fs::remove_dir_all(dir);
    fs::create_dir_all(dir).map_err(|e| e.to_string())?;
    for (name, text) in c.files {
        fs::write(dir.join(name), text).map_err(|e| e.to_string())?;
    }
    let mut child = command
        .current_dir(dir)
        .env("LC_ALL", "C")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| e.to_string())?;
    let mut pipes = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
    let out = std::thread::spawn(move || {
        let mut v = Vec::new();
        pipes.0.read_to_end(&mut v).map(|_| v)
    });
    let err = std::thread::spawn(move || {
        let mut v = Vec::new();
        pipes.1.read_to_end(&mut v).map(|_| v)
    });
    let start = Instant::now();
    let status = loop {
        match child.try_wait().map_err(|e| e.to_string())? {
            Some(status) => break status,
            None if start.elapsed() > Duration::from_secs(120) => {
                let _ = child.kill();
                let _ = child.wait();
                return Err("not done after 120 s".into());
            }
            None => std::thread::sleep(Duration::from_millis(2)),
        }
    };
    let stdout = out.join().expect("reader").map_err(|e| e.to_string())?;
    let stderr = err.join().expect("reader").map_err(|e| e.to_string())?;
    Ok(Outcome { stdout, stderr, status })
}

fn text(bytes: &[u8]) -> String {
    let s = String::from_utf8_lossy(bytes);
    if s.len() > 1500 { format!("{}…", &s[..s.floor_char_boundary(1500)]) } else { s.into_owned() }
}

/// bivisor says on standard error how a guest died; native says nothing. Those lines are its own.
fn without_own_lines(stderr: &[u8]) -> Vec<u8> {
    let own = |line: &&[u8]| !line.starts_with(b"bivisor: ");
    stderr.split_inclusive(|b| *b == b'\n').filter(own).flatten().copied().collect()
}

fn backend(name: &str) {
    if let Err(reason) = available(name) {
        println!("SKIPPED: all programs on {name}: {reason}");
        return;
    }
    let only = std::env::var("BIVISOR_PROGRAM").ok();
    let root = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("programs-{name}"));
    let (mut ran, mut failed) = (0, Vec::new());
    for c in CASES {
        if only.as_deref().is_some_and(|o| !c.name.contains(o)) {
            continue;
        }
        if let Some(missing) = c.needs.iter().find(|n| !on_path(n)) {
            println!("SKIPPED: {} on {name}: `{missing}` is not installed", c.name);
            continue;
        }
        let start = Instant::now();
        let native = run(Command::new(c.argv[0]).args(&c.argv[1..]), c, &root).expect("native runs");
        let native_time = start.elapsed();
        let start = Instant::now();
        let mut command = Command::new(env!("CARGO_BIN_EXE_bivisor"));
        command.args(["run", "--backend", name, "--"]).args(c.argv);
        ran += 1;
        match run(&mut command, c, &root) {
            Ok(mut ours) => {
                ours.stderr = without_own_lines(&ours.stderr);
                println!("{name}: {}: native {native_time:.2?}, {name} {:.2?}", c.name, start.elapsed());
                if ours != native {
                    failed.push(format!(
                        "{} on {name}:\n native: {:?}\n{}{}\n {name}: {:?}\n{}{}",
                        c.name,
                        native.status,
                        text(&native.stdout),
                        text(&native.stderr),
                        ours.status,
                        text(&ours.stdout),
                        text(&ours.stderr),
                    ));
                }
            }
            Err(why) => failed.push(format!("{} on {name}: {why}", c.name)),
        }
    }
    let _ = fs::remove_dir_all(&root);
    println!("{name}: {ran} programs ran, {} differ from native", failed.len());
    assert!(failed.is_empty(), "{}", failed.join("\n\n"));
}

/// Can this host have the engine? The reason if not.
fn available(name: &str) -> Result<(), String> {
    let probe = Command::new(env!("CARGO_BIN_EXE_bivisor"))
        .args(["run", "--backend", name, "--", "true"])
        .output()
        .map_err(|e| e.to_string())?;
    match (name, probe.status.success()) {
        // Only KVM may be missing.
        ("kvm", false) => Err(text(&probe.stderr).trim().to_owned()),
        _ => Ok(()),
    }
}

#[test]
fn interp() {
    backend("interp");
}

#[test]
fn bt() {
    backend("bt");
}

#[test]
fn kvm() {
    backend("kvm");
}

/// A Rust test binary: this one.
#[test]
fn a_rust_test_binary() {
    let this = std::env::current_exe().expect("the test binary");
    let native = Command::new(&this).arg("--list").output().expect("runs");
    for name in ["interp", "bt"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bivisor"));
        let ours =
            command.args(["run", "--backend", name, "--"]).arg(&this).arg("--list").output().expect("bivisor runs");
        assert_eq!(text(&ours.stdout), text(&native.stdout), "{name}: {}", text(&ours.stderr));
    }
}

/// This repository's own history, where it is a checkout.
#[test]
fn git_log_of_this_repository() {
    let dir = Path::new(FILES_TEST);
    if !dir.join(".git").exists() || !on_path("git") {
        println!("SKIPPED: no git checkout");
        return;
    }
    let args = ["-C", FILES_TEST, "log", "-5", "--format=%H %an %s"];
    let native = Command::new("git").args(args).output().expect("git runs");
    for name in ["interp", "bt"] {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bivisor"));
        let ours = command.args(["run", "--backend", name, "--", "git"]).args(args).output().expect("bivisor runs");
        assert_eq!(text(&ours.stdout), text(&native.stdout), "{name}: {}", text(&ours.stderr));
    }
}

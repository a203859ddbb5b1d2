"""Explicit-state checker of docs/protocol.md, section 9: runs, over an abstract at-least-once task layer.

Dense on purpose, to be read beside the page; `run_runs.py` has the graphs and the rules that can be switched off.

run   = None | (status, paused, rgen, steps, undo, applied, buf, withheld)
 steps[i]=(gen,st,tag) st: idle act done failed stopped maybe ; undo[i]= - act done
tasks = {tid:(status, token, terminal_value)} ; tid=(kind, i, gen)
procs = multiset of (tid, token, pc, arg, read)   pc: R H C S F   (X = expirer without a claim)
"""
import sys,time
from collections import deque
class Cfg: pass
def cfg(deps,undo=(),wait=(),fail=(),ext=(),K=1,die=True,losses=0,muts=(),expire=(),prune=False,maxstates=1500000):
    c=Cfg(); c.deps=deps;c.n=len(deps);c.undo=set(undo);c.wait=set(wait);c.fail=set(fail);c.ext=tuple(ext);c.K=K;c.die=die
    c.losses=losses;c.m=set(muts);c.expire=set(expire);c.prune=prune;c.maxstates=maxstates; return c
ENDED=('completed','failed','cancelled')
def settle(c,r):
    s,u=r['steps'],r['undo']
    if r['status']=='running':
        if any(x[1]=='failed' for x in s): r['status']='failing'
        else:
            ch=True
            while ch:
                ch=False
                for i in range(c.n):
                    if s[i][1]=='idle' and all(s[d][1]=='done' for d in c.deps[i]):
                        if i in c.wait and r['buf']:
                            r['buf']-=1; s[i]=(s[i][0],'done','sig'); ch=True
                        else: s[i]=(s[i][0],'act','')
            if all(x[1]=='done' for x in s): r['status']='completed'
    if r['status'] in('failing','cancelling'):
        for i in c.wait:
            if s[i][1]=='act': s[i]=(s[i][0],'stopped','')
        if 'END_AT_ONCE' in c.m:            # failing is final for step outcomes: active steps are written off
            for i in range(c.n):
                if s[i][1]=='act': s[i]=(s[i][0],'maybe','')
        if not any(x[1]=='act' for x in s):
            for i in range(c.n):
                if i in c.undo and u[i]=='-' and (s[i][1] in('done','maybe') or (s[i][1]=='failed' and 'UNDO_DONE_ONLY' not in c.m)): u[i]='act'
            if not any(x=='act' for x in u): r['status']='failed' if r['status']=='failing' else 'cancelled'
def settle2(c,r):
    settle(c,r)
    if r['status'] in ENDED and 'END_PAUSED' not in c.m: r['paused']=0
def cons(c,r,ev,first):
    """everything the record says is due"""
    st=r['status']; s=r['steps']; out=[('close',g) for g in range(1,r['rgen'])] if not({'CLOSE_OWN_GEN','OPEN_NO_GEN'}&c.m) else []
    if r['paused']: return [o for o in out if o[0]=='close']
    if st=='running':
        for i in range(c.n):
            if s[i][1]=='act': out.append(('sub',('timer' if i in c.wait else 'step',i,s[i][0])))
            elif i in c.wait and s[i][1]=='done': out.append(('can',('timer',i,s[i][0])))
    elif st in('failing','cancelling'):
        for i in range(c.n):
            if s[i][1]=='act':
                if 'UNWIND_NO_CREATE' not in c.m: out.append(('sub',('step',i,s[i][0])))
            elif i in c.wait: out.append(('can',('timer',i,s[i][0])))
            if r['undo'][i]=='act': out.append(('sub',('undo',i,s[i][0])))
    else:
        for i in range(c.n):
            if i in c.wait and s[i][1]!='idle': out.append(('can',('timer',i,s[i][0])))
        out.append(('close',r['rgen']))
    return out
def advance(c,run,ev,outc):
    """-> run', followups, note"""
    k,i,g=ev
    if k=='start':
        if run is None:
            r=dict(status='running',paused=0,rgen=1,steps=[(1,'idle','')]*c.n,undo=['-']*c.n,applied=frozenset(),buf=0,withheld=())
            first=True
        else: r=thaw(run); first=False
    else:
        r=thaw(run); first=False; s=r['steps']
        if k=='step':
            if s[i][0]==g and s[i][1]=='act' and outc is not None: s[i]=(g,outc,''); first=True
        elif k=='timer':
            if s[i][0]==g and s[i][1]=='act' and r['status']=='running': s[i]=(g,'done','tmo'); first=True
        elif k=='undo':
            if s[i][0]==g and r['undo'][i]=='act' and outc=='done': r['undo'][i]='done'; first=True
        elif k=='signal':
            if (ev not in r['applied'] or 'NO_APPLIED' in c.m):
                r['applied']|={ev}; first=True
                if r['status']=='running':
                    w=[j for j in sorted(c.wait) if s[j][1]=='act']
                    if w: s[w[0]]=(s[w[0]][0],'done','sig')
                    else: r['buf']+=1
        elif k=='cancel':
            if r['status']=='running' and (g==r['rgen'] or 'CANCEL_NO_GEN' in c.m): r['status']='cancelling'; first=True; r['paused']=0
        elif k in('pause','resume'):
            new_=(ev not in r['applied'] and not(k=='pause' and any(x[0]=='resume' for x in r['applied']) and 'PAUSE_NO_ORDER' not in c.m)) or 'NO_APPLIED' in c.m
            if new_:
                r['applied']|={ev}; first=True
                if r['status']not in ENDED and not(k=='pause' and r['status']!='running'): r['paused']=1 if k=='pause' else 0
        elif k=='retry':
            if r['status'] in('failed','cancelled') and (g==r['rgen'] or 'RETRY_NO_GEN' in c.m):
                first=True; r['rgen']+=1; r['status']='running'; r['paused']=0
                for j in range(c.n):
                    if s[j][1]=='idle' : continue
                    if 'RETRY_ONLY_FAILED' in c.m:
                        if s[j][1]=='failed': s[j]=(s[j][0]+1,'idle','')
                        elif s[j][1]in('stopped','maybe'): s[j]=(s[j][0],'act','')
                    elif s[j][1]!='done' or r['undo'][j]!='-': s[j]=(s[j][0]+1,'idle','')
                    if r['undo'][j]!='-' and s[j][1]!='done': r['undo'][j]='-'
                if 'RETRY_NO_DOWN' not in c.m and 'RETRY_ONLY_FAILED' not in c.m:
                    for j in range(c.n):            # and what is downstream of one: its input is made anew (steps are in order)
                        if s[j][1] not in('idle','act') and any(s[d][1]=='idle' for d in c.deps[j]): s[j]=(s[j][0]+1,'idle',''); r['undo'][j]='-'
    before=set(j for j in range(c.n) if r['steps'][j][1]=='act')
    settle2(c,r)
    out=cons(c,r,ev,first)
    if 'DUP_NOTHING' in c.m and not first: out=[]
    if 'EVENT_ONLY' in c.m and r['status']=='running' and not r['paused']:
        # literal: only the tasks that this event made due; a duplicate: own successors that are due
        new=set(j for j in range(c.n) if r['steps'][j][1]=='act')-before
        if first and k!='resume': keep=new
        elif k=='resume': keep=set(r['withheld']); r['withheld']=()
        elif k=='start': keep=set(j for j in range(c.n) if not c.deps[j])
        else: keep=set(j for j in range(c.n) if i in c.deps[j])
        out=[o for o in out if o[0]!='sub' or o[1][1] in keep]
    elif 'EVENT_ONLY' in c.m and r['paused'] and first:
        new=set(j for j in range(c.n) if r['steps'][j][1]=='act')-before
        r['withheld']=tuple(sorted(set(r['withheld'])|new))
    return freeze(r),tuple(out),first
def thaw(t): return dict(status=t[0],paused=t[1],rgen=t[2],steps=list(t[3]),undo=list(t[4]),applied=t[5],buf=t[6],withheld=t[7])
def freeze(r): return (r['status'],r['paused'],r['rgen'],tuple(r['steps']),tuple(r['undo']),r['applied'],r['buf'],r['withheld'])
# ghost: frozenset of facts ('started',i,g) ('undone',i,g) ('payload gone',i)
def check(c):
    ts0=(('start',0,1),('pending',0,''))
    init=(None,(ts0,),(),c.ext,c.K,frozenset(),frozenset({1}),c.losses)
    seen={init:None}; q=deque([init]); viol={}; quiet=0; t0=time.time()
    while q:
        s=q.popleft()
        internal,ext=succ(c,s)
        for lab,n,v in internal+ext:
            if v and v not in viol: viol[v]=trace(seen,s)+[lab]
            if n not in seen: seen[n]=(s,lab); q.append(n)
        if not internal:
            quiet+=1
            for v in final(c,s):
                if v not in viol: viol[v]=trace(seen,s)+[show(s)]
        if len(seen)>c.maxstates: viol['(state limit)']=[]; break
    return len(seen),quiet,viol,time.time()-t0
def trace(seen,s):
    o=[]
    while seen[s]: s,l=seen[s]; o.append(l)
    return o[::-1]
def show(s): return 'END run=%s tasks=%s'%(s[0] and (s[0][0],'paused' if s[0][1] else '',s[0][3],s[0][4]), {k:v[0] for k,v in s[1]})
def nm(t): return '%s%s.g%d'%(t[0],t[1] if t[0] in('step','timer','undo') else '',t[2])
def succ(c,s):
    run,tasks,procs,ext,K,gh,opn,losses=s; T=dict(tasks); out=[]; ex=[]
    def mk(run=run,T=T,procs=procs,ext=ext,K=K,gh=gh,opn=opn,losses=losses): return (run,tuple(sorted(T.items())),tuple(sorted(procs)),ext,K,gh,opn,losses)
    def setT(t,v): d=dict(T); d[t]=v; return d
    def trim(fo,opn=opn):
        fo=list(fo)
        return tuple(o for o in fo if not((o[0]=='sub' and o[1] in T) or (o[0]=='can' and o[1] in T and T[o[1]][0]=='terminal') or (o[0]=='close' and 'OPEN_NO_GEN' not in c.m and o[1] not in opn)))
    def rep(p,q): l=list(procs); l.remove(p); return tuple(l+([q] if q else []))
    for t,(st,tok,val) in tasks:
        if st=='pending':
            if t[0]!='start' and run is None: continue      # snoozes until the start was carried out
            if t[0]=='undo' and 'UNDO_EARLY' not in c.m and T.get(('step',t[1],t[2]),('',))[0]!='terminal': continue   # undo snoozes until the step's own task is terminal
            if t[0] in('step','undo') and run[1]: continue          # paused: it would only snooze again
            if t[0]=='step' and 'GEN_EARLY' not in c.m and any(x[0]=='step' and x[1]==t[1] and x[2]<t[2] and T[x][0]!='terminal' for x in T): continue   # so does a step's next generation until the last one's task is
            out.append(('claim '+nm(t),mk(T=setT(t,('running',tok+1,'')),procs=procs+((t,tok+1,'R',None,0),)),None))
            if t[0]=='step' and t[1] in c.expire and tok==0:
                if 'EXPIRE_NO_CLAIM' in c.m:
                    if not any(p[0]==t and p[2] in'XY' for p in procs):
                        out.append(('expirer finds '+nm(t)+' past its deadline',mk(procs=procs+((t,0,'X','failed',0),)),None))
                else: out.append(('expirer claims '+nm(t),mk(T=setT(t,('running',tok+1,'')),procs=procs+((t,tok+1,'C','failed',1),)),None))
        elif st=='running' and K>0:
            old=[p for p in procs if p[0]==t and p[1]==tok]
            new=(t,tok+1,'R',None,0)
            if old: out.append(('TAKEOVER of %s, old worker at %s becomes a zombie'%(nm(t),old[0][2]),mk(T=setT(t,('running',tok+1,'')),procs=procs+(new,),K=K-1),None))
            l=list(procs); [l.remove(p) for p in old]
            out.append(('CRASH at %s and takeover of %s'%(old[0][2] if old else '-',nm(t)),mk(T=setT(t,('running',tok+1,'')),procs=tuple(l)+(new,),K=K-1),None))
            if losses and (t[0]=='step' or (t[0]=='start' and 'START_REAPED' in c.m)):
                rp=(t,tok+1,'C','failed',1)
                if t[0]=='start':
                    out.append(('start out of losses: failed by the reaper',mk(T=setT(t,('terminal',tok+1,'failed')),procs=tuple(l),losses=losses-1),None)); continue
                if old: out.append(('REAPER: %s out of losses, old worker at %s a zombie'%(nm(t),old[0][2]),mk(T=setT(t,('running',tok+1,'')),procs=procs+(rp,),K=K-1,losses=losses-1),None))
                out.append(('REAPER: CRASH at %s, %s out of losses'%(old[0][2] if old else '-',nm(t)),mk(T=setT(t,('running',tok+1,'')),procs=tuple(l)+(rp,),K=K-1,losses=losses-1),None))
    for p in set(procs):
        t,tok,pc,arg,rd=p
        if pc=='F' and not(T[t][1]==tok and T[t][0]=='running'):   # fenced off for good: nothing else can matter
            return [(nm(t)+'/claim%d finish: fenced off'%tok,mk(procs=rep(p,None)),None)],[]
    for p in set(procs):
        t,tok,pc,arg,rd=p; k,i,g=t; mine=T[t][1]==tok and T[t][0]=='running'; w='%s/claim%d'%(nm(t),tok)
        if c.die and not mine and pc not in'XY': out.append((w+' zombie dies at '+pc,mk(procs=rep(p,None)),None))
        if pc=='R':
            if k in('step','undo'):
                S=run[3][i]
                if k=='step': go=run[0]=='running' and S[0]==g and S[1]=='act'; dup=S[0]!=g or S[1]!='act'
                else: go=run[0] in('failing','cancelling') and S[0]==g and run[4][i]=='act'; dup=not go
                if run[1] and not dup and run[0]!='cancelling':
                    if 'PAUSED_FINISH' in c.m: out.append((w+' reads run: paused, finishes without running',mk(procs=rep(p,(t,tok,'F',None,1))),None))
                    elif mine: out.append((w+' reads run: paused, snoozes',mk(T=setT(t,('pending',tok,'')),procs=rep(p,None)),None))
                    else: out.append((w+' zombie stops',mk(procs=rep(p,None)),None))
                elif go: out.append((w+' reads run: go',mk(procs=rep(p,(t,tok,'H',None,1))),None))
                elif dup: out.append((w+' reads run: outcome there / other gen',mk(procs=rep(p,(t,tok,'C',None,1))),None))
                else:
                    o='stopped' if (tok==1 or 'STOPPED_IS_UNSTARTED' in c.m) else 'maybe'
                    out.append((w+' reads run: %s, does not run (%s)'%(run[0],o),mk(procs=rep(p,(t,tok,'C' if 'NO_VERIFY' in c.m else 'V',o,1))),None))
            else: out.append((w+' goes',mk(procs=rep(p,(t,tok,'C','done',1))),None))
        elif pc=='V':
            if mine: out.append((w+' checks: still its claim',mk(procs=rep(p,(t,tok,'C',arg,1))),None))
            else: out.append((w+' checks: claim lost, stops',mk(procs=rep(p,None)),None))
        elif pc=='H':
            v=None
            if k=='step' and mine and ('undone',i,g) in gh: v='handler under a live claim runs after its undo'
            if k=='step' and any(q[0]==('step',i,g-1) and q[2]=='H' and T[q[0]]==('running',q[1],'') for q in procs): v='two generations of a step run at once, both under live claims'
            if k=='step' and not rd and (run[0]!='running' or run[1] or run[3][i][0]!=g): v='handler starts after the run was %s, no read since its claim'%(run[0] if run[0]!='running' else 'paused' if run[1] else 'retried')
            if k=='step' and not all(run[3][d][1]=='done' for d in c.deps[i]) and run[3][i][0]==g and run[0]=='running': v='step starts without its inputs'
            if k=='step' and run[0]=='running' and run[3][i][1]=='act' and any(('gone',d) in gh and run[3][d][1]=='done' for d in c.deps[i]): v='result of an input does not exist'
            fact=('started' if k=='step' else 'undone',i,g)
            for o in (('done','failed') if (k=='step' and i in c.fail) else ('done',)):
                g2=gh|{fact}
                if k=='step' and o=='done': g2|={('did',i,g)}
                if k=='step' and run[3][i][0]==g: g2|={('from',i,g,tuple(run[3][d][0] for d in c.deps[i]))}
                out.append((w+' handler runs: '+o,mk(procs=rep(p,(t,tok,'C',o,1)),gh=g2),v))
        elif pc in'CX':
            r2,fo,first=advance(c,run,t,arg); v=None
            if run and k=='step' and run[3][i][1]!='act' and r2[3][i][1]!=run[3][i][1] and r2[3][i][0]==run[3][i][0] and run[2]==r2[2]: v='outcome recorded twice'
            if k=='cancel' and first and run[2]!=g: v='an old cancel is applied to the retried run'
            if 'REAPER_NO_CONS' in c.m and pc=='C' and arg=='failed' and ('started',i,g) not in gh: fo=()
            o2=opn
            if k=='retry' and first: o2=opn|{r2[2] if 'OPEN_NO_GEN' not in c.m else 1}
            fo=trim(fo,o2); nx='S' if fo else ('F' if pc=='C' else 'Y')
            out.append((w+' CAS run: %s%s%s -> %s%s'%(k,' '+arg if arg else '','' if first else ' (no change)',r2[0],' paused' if r2[1] else ''),mk(run=r2,procs=rep(p,(t,tok,'S',fo,1) if pc=='C' and fo else (t,tok,nx if pc=='C' else 'Y',None,1)),opn=o2),v))
        elif pc=='S':
            a,x=arg[0]; rest=trim(arg[1:]); T2=T; pr=(t,tok,'S',rest,1) if rest else (t,tok,'F',None,1); o2=opn; add=()
            if a=='sub' and x not in T:
                if 'IN_HAND' in c.m and x[0]=='step': T2=setT(x,('running',1,'')); add=((x,1,'H',None,0),)
                else: T2=setT(x,('pending',0,''))
            if a=='can' and x in T and T[x][0]=='pending': T2=setT(x,('terminal',T[x][1],'cancelled'))
            if a=='close': o2=opn-{x if 'OPEN_NO_GEN' not in c.m else 1}
            lab=w+' %s %s'%({'sub':'submits','can':'cancels','close':'deletes open entry'}[a],nm(x) if a!='close' else x)
            out.append((lab,mk(T=T2,procs=rep(p,pr)+add,opn=o2),'unfinished run loses its open entry' if a=='close' and run[0] not in ENDED and not o2 else None))
        elif pc=='F':
            if mine: out.append((w+' finishes its task',mk(T=setT(t,('terminal',tok,'x')),procs=rep(p,None)),None))
            else: out.append((w+' finish: fenced off',mk(procs=rep(p,None)),None))
        elif pc=='Y':
            d=setT(t,('terminal',0,'expired')) if T[t][0]=='pending' else T
            out.append(('expirer CAS task',mk(T=d,procs=rep(p,None)),None))
    if c.prune and run:
        for t,(st,tok,val) in tasks:
            if t[0]=='step' and st=='terminal' and ('gone',t[1]) not in gh and (run[0] in ENDED or 'PRUNE_EARLY' in c.m):
                out.append(('prune '+nm(t)+' and its payload',mk(gh=gh|{('gone',t[1])}),None))
    for e in set(ext):
        e2=list(ext); e2.remove(e); rg=run[2] if run else 1
        if e=='resume' and 'pause' in ext: continue
        if e=='retry' and not(run and run[0] in('failed','cancelled')): continue
        n=sum(1 for t in T if t[0]==e)
        tid=(e,n,rg); ex.append(('user: '+e,mk(T=setT(tid,('pending',0,'')),ext=tuple(e2)),None))
    return out,ex
def final(c,s):
    run,tasks,procs,ext,K,gh,opn,losses=s; v=[]
    if procs: v.append('process cannot go on')
    if run is None: 
        if any(st=='pending' for t,(st,_,_) in tasks): v.append('task waits forever for a run that never starts')
        return v+['run never came to be']
    if not run[1]:
        if run[0] not in ENDED: v.append('STUCK: run %s, nothing live'%run[0])
        for t,(st,_,_) in tasks:
            if st!='terminal': v.append('live task at the end: '+t[0])
    elif run[0] in ENDED: v.append('ended and paused')
    elif 'resume' not in ext and any(t[0]=='resume' and x[0]=='terminal' for t,x in tasks) : v.append('paused though the resume was carried out last')
    if run[2]>1+sum(1 for t,_ in tasks if t[0]=='retry'): v.append('one retry applied twice')
    if sum(1 for S in run[3] if S[2]=='sig')+run[6]>sum(1 for t,_ in tasks if t[0]=='signal'): v.append('one signal taken by two waits')
    if run[0]=='completed':
        for i,S in enumerate(run[3]):
            if ('undone',i,S[0]) in gh: v.append('undone in a completed run')
            if i not in c.wait and ('from',i,S[0],tuple(run[3][d][0] for d in c.deps[i])) not in gh: v.append('a step stands on an input of an earlier generation')
            if i in c.wait and S[2] not in('sig','tmo'): v.append('wait without a winner')
    if run[0] in('failed','cancelled'):
        for i in c.undo:
            g=run[3][i][0]
            if run[3][i][1]=='done' and ('undone',i,g) not in gh: v.append('recorded done, never undone')
            if ('did',i,g) in gh and ('undone',i,g) not in gh: v.append('handler finished in truth, never undone (recorded %s)'%run[3][i][1])
    if run[0] in ENDED and opn: v.append('open entry of an ended run')
    if run[0] not in ENDED and run[2] not in opn and 'OPEN_NO_GEN' not in c.m: v.append('unfinished run without open entry')
    if run[0] not in ENDED and not opn and 'OPEN_NO_GEN' in c.m: v.append('unfinished run without open entry')
    return v

import sys
from runs import *
CH=((),(0,)); DIA=((),(),(0,1)); FORK=((),(0,),(0,),(1,2)); W=((),(0,)) 
B=dict(
 chain_K2=dict(deps=CH,K=2), dia_K2=dict(deps=DIA,K=2), diamond4=dict(deps=FORK,K=1),
 chain_cancel_undo=dict(deps=CH,undo=(0,1),ext=('cancel',),K=2),
 chain_fail_undo_retry=dict(deps=CH,undo=(0,),fail=(1,),ext=('retry',),K=2),
 par_fail_undo=dict(deps=DIA,undo=(0,1),fail=(1,),K=1),
 par_fail_retry=dict(deps=((),()),undo=(),fail=(1,),ext=('retry',),K=2),
 par_fail_undo_retry=dict(deps=((),()),undo=(0,),fail=(1,),ext=('retry',),K=1),
 pause=dict(deps=CH,ext=('pause','resume'),K=2), pause_dia=dict(deps=DIA,ext=('pause','resume'),K=1),
 pause_fail_undo=dict(deps=CH,undo=(0,),fail=(1,),ext=('pause','resume'),K=1),
 pause_cancel=dict(deps=CH,undo=(0,),ext=('pause','cancel'),K=1),
 wait=dict(deps=((),(0,)),wait=(0,),ext=('signal',),K=2), wait_after=dict(deps=((),(0,),(1,)),wait=(1,),ext=('signal',),K=1),
 wait2=dict(deps=((),(0,)),wait=(0,1),ext=('signal',),K=2),
 wait_cancel=dict(deps=((),(0,)),wait=(1,),undo=(0,),ext=('signal','cancel'),K=1),
 wait_pause=dict(deps=((),(0,)),wait=(0,),ext=('signal','pause','resume'),K=1),
 cancel_retry=dict(deps=CH,ext=('cancel','retry'),K=2), cancel_retry_undo=dict(deps=CH,undo=(0,),ext=('cancel','retry'),K=1),
 reap=dict(deps=CH,undo=(0,),losses=1,K=2), reap_retry=dict(deps=((),()),losses=1,ext=('retry',),K=2),
 expire=dict(deps=CH,undo=(1,),expire=(1,),K=1),
 prune=dict(deps=DIA,prune=True,K=1),
)
for n in list(B):
    if B[n].get('K')==2: B[n+'_K1']=dict(B[n],K=1)
M=[('CLOSE_OWN_GEN','cancel_retry'),('CANCEL_NO_GEN','cancel_retry'),('NO_APPLIED','wait2'),('RETRY_NO_GEN','par_fail_retry'),('END_PAUSED','pause'),('PAUSE_NO_ORDER','pause'),('DUP_NOTHING','chain_K2'),('EVENT_ONLY','pause'),('EVENT_ONLY','dia_K2'),('PAUSED_FINISH','pause'),('NO_APPLIED','pause'),('NO_APPLIED','wait2'),('CANCEL_NO_GEN','cancel_retry'),
 ('RETRY_NO_GEN','chain_fail_undo_retry'),('RETRY_ONLY_FAILED','par_fail_retry'),('END_AT_ONCE','chain_cancel_undo'),('END_AT_ONCE','par_fail_undo'),('UNWIND_NO_CREATE','chain_cancel_undo'),
 ('STOPPED_IS_UNSTARTED','chain_cancel_undo'),('REAPER_NO_CONS','reap'),('UNDO_DONE_ONLY','par_fail_undo'),('UNDO_DONE_ONLY','chain_cancel_undo_K1'),('IN_HAND','cancel_retry_K1'),('IN_HAND','pause_K1'),('OPEN_NO_GEN','chain_fail_undo_retry'),
 ('EXPIRE_NO_CLAIM','expire'),('PRUNE_EARLY','prune'),('START_REAPED','reap_sig')]
B['reap_sig']=dict(deps=CH,losses=1,ext=('signal',),K=1)
M=[(m,n+'_K1' if n+'_K1' in B else n) for m,n in M]
B['chain_cancel_undo_K1'];
M=[('RETRY_ONLY_FAILED','par_fail_retry_K1'),('END_AT_ONCE','chain_cancel_undo_K1'),('UNWIND_NO_CREATE','chain_cancel_undo_K1'),('UNDO_DONE_ONLY','par_fail_undo'),('STOPPED_IS_UNSTARTED','par_fail_undo'),('REAPER_NO_CONS','reap_K1'),('EXPIRE_NO_CLAIM','expire'),('UNDO_DONE_ONLY','expire'),('PRUNE_EARLY','prune'),('START_REAPED','reap_sig'),('IN_HAND','pause_K1'),('IN_HAND','cancel_retry_K1'),('CANCEL_NO_GEN','cancel_retry_K1'),('NO_APPLIED','wait2_K1'),('RETRY_NO_GEN','par_fail_retry_K1'),('OPEN_NO_GEN','cancel_retry_K1'),('CLOSE_OWN_GEN','cancel_retry_K1'),('RETRY_NO_GEN','chain_fail_undo_retry_K1'),('OPEN_NO_GEN','par_fail_retry_K1')]
B['retry_below']=dict(deps=((),(0,),(1,)),undo=(0,),fail=(2,),ext=('retry',),K=0)
B['two_generations']=dict(deps=((),()),fail=(1,),ext=('retry',),K=1)
M+=[('GEN_EARLY','two_generations'),('RETRY_NO_DOWN','retry_below')]
def go(name,muts=()):
    n,q,v,t=check(cfg(muts=muts,**B[name]))
    print('%-22s %-22s states %8d final %5d %5.1fs %s'%(name,','.join(muts) or 'FIXED',n,q,t,'OK' if not v else 'VIOLATIONS'),flush=True)
    for k,tr in sorted(v.items()):
        print('   **',k)
        for i,l in enumerate(tr): print('      %d. %s'%(i+1,l))
if __name__=='__main__':
    if sys.argv[1]=='fixed':
        for n in (sys.argv[2:] or B): go(n)
    elif sys.argv[1]=='mut':
        for m,n in M: go(n,(m,))
    else: go(sys.argv[1],tuple(sys.argv[2:]))
